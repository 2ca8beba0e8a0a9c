//! Who is responsible: whoever answers is left alone. An unresponsive predecessor, who is named,
//! is stopped, robbed and ended, and its lock replaced: the lock of a process that does not end
//! would be held for ever.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use recoverd_common::{
    failpoint,
    paths::Beside,
    proc::{FileId, Proc, Stop},
    seen::Seen,
    shim_client::{CallError, ShimClient},
};

use super::loot::{self, Loot};
use crate::{
    lock::{self, Attempt},
    sys,
    tasks::Process,
    witness,
};

/// For an answer of whoever listens.
const ANSWERS: Duration = Duration::from_millis(500);
/// For whoever holds the lock and does not answer yet: he begins, or ends.
const HOLDER: Duration = Duration::from_millis(2_000);
/// For a predecessor to be stopped, or to be gone.
const ENDS: Duration = Duration::from_millis(2_000);
/// For an instant at which it is not in the middle of something.
const RESTS: Duration = Duration::from_millis(100);

/// What claiming the tasks brought.
#[derive(Debug)]
pub enum Claimed {
    /// They are ours.
    Ours(Claim),
    /// Somebody answers, or becomes responsible right now; why.
    StandBack(String),
}

/// Responsibility.
#[derive(Debug)]
pub struct Claim {
    lock: File,
    /// It waits to replace the predecessor's.
    waits: bool,
    beside: Beside,
    predecessor: Option<(i32, OwnedFd)>,
}

/// Claims the tasks of the shim at `socket`. Who has its listener asks nobody there: he would wait
/// for himself.
pub fn claim(
    socket: &Path,
    namespace: &str,
    id: &str,
    predecessor: Option<Process>,
    has_listener: bool,
) -> Result<Claimed, String> {
    let beside = Beside::of(socket);
    let failed = |e: io::Error| format!("lock {}: {e}", beside.lock.display());
    let predecessor = predecessor.and_then(|process| {
        // Gone by now, or not he: then there is nobody to be ended.
        let pidfd = witness::open(&Proc::new("/proc"), process).ok()?;
        let pid = i32::try_from(process.pid).ok()?;
        (!witness::has_ended(&pidfd)).then_some((pid, pidfd))
    });
    let until = Instant::now() + HOLDER;
    loop {
        let (lock, waits) = match lock::attempt(&beside.lock).map_err(failed)? {
            Attempt::Taken(lock) => (Some(lock), false),
            Attempt::Held => {
                let holds = predecessor
                    .as_ref()
                    .is_some_and(|(pid, _)| holds(*pid, &beside.lock));
                match holds {
                    false => (None, false),
                    true => match lock::attempt_next(&beside.lock).map_err(failed)? {
                        Attempt::Taken(lock) => (Some(lock), true),
                        Attempt::Held => (None, false),
                    },
                }
            }
        };
        failpoint!("adopt.lock.after");
        let answer = match &lock {
            Some(_) if has_listener => Err(CallError::NobodyListens(io::ErrorKind::Other.into())),
            Some(_) | None => ask(socket, namespace, id),
        };
        let named = predecessor.as_ref().map(|(pid, _)| *pid);
        let by_name = |pid: u32| i32::try_from(pid).ok() == named;
        let listens = match answer {
            Ok(pid) if named.is_none() || !by_name(pid) => {
                if let Some(lock) = lock {
                    leave(lock, waits, &beside);
                }
                return Ok(Claimed::StandBack(format!("shim {pid} answers")));
            }
            Ok(_) => false,
            Err(CallError::NobodyListens(_)) => false,
            Err(_) => named.is_none(),
        };
        match lock {
            Some(lock) if listens => {
                // No lock, but a socket that accepts: a stock shim that does not answer.
                leave(lock, waits, &beside);
                return Err("a shim listens and does not answer, and is not named".to_owned());
            }
            Some(lock) => {
                return Ok(Claimed::Ours(Claim {
                    lock,
                    waits,
                    beside,
                    predecessor,
                }));
            }
            None if Instant::now() >= until => {
                return Err(format!(
                    "{} is held by a process that does not answer",
                    beside.lock.display()
                ));
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The pid of whoever answers at `socket`.
fn ask(socket: &Path, namespace: &str, id: &str) -> Result<u32, CallError> {
    let mut client = ShimClient::connect(socket, namespace, Instant::now() + ANSWERS)?;
    match client.connect_task(id) {
        Ok(answer) => Ok(answer.shim_pid),
        Err(error) if error.is_answer() => Ok(0),
        Err(error) => Err(error),
    }
}

/// True if process `pid` has the file at `lock` open: nobody but its holder keeps it open.
fn holds(pid: i32, lock: &Path) -> bool {
    let Ok(there) = fs::symlink_metadata(lock) else {
        return false;
    };
    let Seen::Present(descriptors) = Proc::new("/proc").descriptors(pid) else {
        return false;
    };
    descriptors
        .iter()
        .filter(|descriptor| descriptor.target == lock)
        .any(|descriptor| {
            let path = format!("/proc/{pid}/fd/{}", descriptor.number);
            fs::metadata(path)
                .is_ok_and(|meta| (meta.dev(), meta.ino()) == (there.dev(), there.ino()))
        })
}

/// Lets go of a lock, and removes its file unless that is a group's.
fn leave(lock: File, waits: bool, beside: &Beside) {
    let absent = |path: &Path| Seen::Absent == FileId::of_entry(path).map(drop);
    if waits {
        let _ = fs::remove_file(&beside.next_lock);
    } else if absent(&beside.record) && absent(&beside.events) {
        let _ = fs::remove_file(&beside.lock);
    }
    // Held until the file is gone: nobody else has it by now.
    drop(lock);
}

impl Claim {
    /// There is nothing to be responsible for, or it cannot be done.
    pub fn give_up(self) {
        leave(self.lock, self.waits, &self.beside);
    }

    /// Ends the predecessor, if there is one; gives what only it had, and the lock, which is in
    /// its place now.
    /// A predecessor that `copies` output has it in its own memory for a moment: a stock shim.
    pub fn enforce(self, copies: bool) -> Result<(File, Loot, Vec<String>), String> {
        match self.end_predecessor(copies) {
            Ok((loot, remarks)) => Ok((self.lock, loot, remarks)),
            Err(why) => {
                self.give_up();
                Err(why)
            }
        }
    }

    fn end_predecessor(&self, copies: bool) -> Result<(Loot, Vec<String>), String> {
        let mut loot = Loot::default();
        let mut remarks = Vec::new();
        if let Some((pid, pidfd)) = &self.predecessor {
            let failed = |what: &str, e: io::Error| format!("{what} shim {pid}: {e}");
            let met = stop(*pid, pidfd).map_err(|e| failed("stop", e))?;
            if copies && met == Seen::Present(Stop::Midway) {
                remarks.push(format!(
                    "shim {pid} was stopped at work: what it had read of its containers' output \
                     and not yet written, 32 KiB of each at most, is lost"
                ));
            }
            loot = loot::take(Path::new("/proc"), *pid, pidfd);
            failpoint!("adopt.kill.before");
            signal(pidfd, libc::SIGKILL).map_err(|e| failed("end", e))?;
            failpoint!("adopt.kill.after");
            if !witness::await_end(pidfd, ENDS) {
                remarks.push(format!("shim {pid} was sent SIGKILL and is still there"));
            }
        }
        if self.waits {
            failpoint!("adopt.relock.before");
            let place = &self.beside.lock;
            fs::rename(&self.beside.next_lock, place)
                .map_err(|e| format!("replace {}: {e}", place.display()))?;
            failpoint!("adopt.relock.after");
        }
        Ok((loot, remarks))
    }
}

/// Signals the predecessor. Absent: it has ended by itself since it was claimed, as what was pending
/// may make it do when it goes on for a moment; then all is as with one that was found dead.
fn signal(pidfd: &OwnedFd, number: libc::c_int) -> io::Result<Seen<()>> {
    match sys::pidfd_signal(pidfd.as_fd(), number) {
        Ok(()) => Ok(Seen::Present(())),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(Seen::Absent),
        Err(e) => Err(e),
    }
}

/// Stops the predecessor, at rest if it can be met there; where it was met.
fn stop(pid: i32, pidfd: &OwnedFd) -> io::Result<Seen<Stop>> {
    let proc = Proc::new("/proc");
    // Somebody else's stop is not undone: it would do now what it was asked for long ago.
    let stopped = matches!(proc.stat(pid), Seen::Present(stat) if matches!(stat.state, 'T' | 't'));
    let until = Instant::now() + RESTS;
    loop {
        failpoint!("adopt.stop.before");
        if signal(pidfd, libc::SIGSTOP)? == Seen::Absent {
            return Ok(Seen::Absent);
        }
        failpoint!("adopt.stop.after");
        let met = await_stop(&proc, pid);
        if stopped || met != Seen::Present(Stop::Midway) || Instant::now() >= until {
            return Ok(met);
        }
        signal(pidfd, libc::SIGCONT)?;
        thread::sleep(Duration::from_millis(1));
    }
}

/// A stop takes effect when each thread comes to it, which one that waits for a device does not.
fn await_stop(proc: &Proc, pid: i32) -> Seen<Stop> {
    let until = Instant::now() + ANSWERS;
    loop {
        match proc.stop(pid) {
            Seen::Present(Stop::Pending) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(2));
            }
            met => return met,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Of a predecessor that had the lock or, as a stock shim, had none.
    fn claim_of(pid: i32, pidfd: OwnedFd, waits: bool, beside: &Beside) -> Claim {
        let attempt = match waits {
            true => lock::attempt_next(&beside.lock),
            false => lock::attempt(&beside.lock),
        };
        let Attempt::Taken(lock) = attempt.unwrap() else {
            panic!("held")
        };
        Claim {
            lock,
            waits,
            beside: beside.clone(),
            predecessor: Some((pid, pidfd)),
        }
    }

    #[test]
    fn nothing_is_said_of_what_one_had_that_has_ended() {
        let mut process = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(process.id()).unwrap();
        let pidfd = sys::pidfd_open(pid).unwrap();
        assert!(loot::take(Path::new("/proc"), pid, &pidfd).has_no_writer((0, 0)));
        process.kill().unwrap();
        assert!(witness::await_end(&pidfd, ENDS));
        assert!(!loot::take(Path::new("/proc"), pid, &pidfd).has_no_writer((0, 0)));
        process.wait().unwrap();
    }

    #[test]
    fn a_predecessor_that_ended_by_itself_since_it_was_claimed_is_as_good_as_ended() {
        for waits in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let beside = Beside::of(&dir.path().join("s"));
            let mut process = Command::new("sleep").arg("60").spawn().unwrap();
            let pid = i32::try_from(process.id()).unwrap();
            let claim = claim_of(pid, sys::pidfd_open(pid).unwrap(), waits, &beside);
            process.kill().unwrap();
            process.wait().unwrap();
            let (lock, _, remarks) = claim.enforce(true).unwrap();
            assert_eq!(remarks, [""; 0]);
            assert!(lock::is_at(&lock, &beside.lock).unwrap());
        }
    }
}
