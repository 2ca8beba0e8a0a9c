//! How a process ended that somebody else is the parent of.
//!
//! Its pidfd becomes readable when all its threads have ended. Until its parent (mostly PID 1)
//! collects it, it is a zombie whose wait status stands in field 52 of its `stat`; from then on
//! Linux 6.15 and later tell it through the pidfd. Between looking here and there the parent may
//! collect it, so both are asked again. On older kernels the connector has it, for who has listened
//! since before the end: a [`Teller`] is found before a process's identity is proven.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    connector::{Connector, Told},
    proc::{Proc, ProcessId},
    record::Process,
    seen::Seen,
    sys,
};

/// Exit code or 128 + signal.
pub fn status_of_wait(raw: i32) -> u32 {
    let signal = raw & 0x7f;
    let status = if signal == 0 {
        raw >> 8 & 0xff
    } else {
        128 + signal
    };
    u32::try_from(status).unwrap_or(0)
}

/// A descriptor of `process`, if this very process is there, dead or alive; else why not.
pub fn open(proc: &Proc, process: Process) -> Result<OwnedFd, String> {
    let pid = i32::try_from(process.pid).map_err(|e| e.to_string())?;
    let gone = || "it ended while no shim was there to see it".to_owned();
    let pidfd = sys::pidfd_open(pid).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::ESRCH) => gone(),
        _ => format!("open pid {pid}: {error}"),
    })?;
    // The descriptor first: its process cannot be exchanged for another one between the two.
    match proc.stat(pid) {
        Seen::Present(stat) if stat.id.start_time == process.start_time => Ok(pidfd),
        Seen::Present(_) => Err(format!("pid {pid} belongs to another process now")),
        Seen::Absent => Err(gone()),
        Seen::Unknown(why) => Err(format!("look at pid {pid}: {why}")),
    }
}

/// True when it has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut wait = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut wait, PollTimeout::ZERO);
    let [entry] = &wait;
    entry.revents().is_some_and(|seen| !seen.is_empty())
}

/// Waits until it has ended, at most so long.
pub fn await_end(pidfd: &OwnedFd, longest: Duration) -> bool {
    let mut wait = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut wait, timeout);
    let [entry] = &wait;
    entry.revents().is_some_and(|seen| !seen.is_empty())
}

/// How a process that has ended did it, if the kernel still says so.
pub fn status(proc: &Proc, process: Process, pidfd: &OwnedFd) -> Option<u32> {
    let collected = || sys::pidfd_wait_status(pidfd.as_fd());
    let raw = collected()
        .or_else(|| zombie(proc, process))
        .or_else(collected)?;
    Some(status_of_wait(raw))
}

fn zombie(proc: &Proc, process: Process) -> Option<i32> {
    let pid = i32::try_from(process.pid).ok()?;
    let id = ProcessId {
        pid,
        start_time: process.start_time,
    };
    match proc.stat(pid) {
        Seen::Present(stat) if stat.id == id && !stat.alive() => Some(stat.exit_code),
        Seen::Present(_) | Seen::Absent | Seen::Unknown(_) => None,
    }
}

/// So long after a process was seen to have ended, the connector has told of all its threads: the
/// kernel tells of each a moment after that can be seen.
const SETTLES: Duration = Duration::from_millis(100);
/// And so long after, it will not tell any more.
const GIVES_UP: Duration = Duration::from_secs(5);

/// Who tells how a process ended that its parent has collected.
#[derive(Debug, Default)]
pub enum Teller {
    /// Its pidfd.
    #[default]
    Pidfd,
    /// The process-events connector.
    Connector(Connector),
    /// Nobody, and why.
    Nobody(String),
}

/// What a teller says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Exit code or 128 + signal.
    Status(u32),
    /// Nobody will ever know, because of this.
    Unknown(String),
    /// To be asked again a little later.
    NotYet,
}

impl Teller {
    /// The one that this kernel has. What ends from now on is told.
    pub fn find() -> Teller {
        if pidfd_is_used() && matches!(sys::pidfd_tells_status(), Ok(true)) {
            return Teller::Pidfd;
        }
        match Connector::open() {
            Ok(connector) => Teller::Connector(connector),
            Err(why) => Teller::Nobody(why),
        }
    }

    /// From now on only these processes are asked about.
    pub fn narrow(&mut self, pids: &[u32]) {
        if let Teller::Connector(connector) = self {
            // Else the kernel tells of all others, too: a waste, and nothing worse.
            let _ = connector.narrow(pids);
        }
    }

    /// From now on these processes are asked about, `new` among them: whatever is known of that
    /// number was another process. Called before the identity of the new one is proven.
    pub fn add(&mut self, pids: &[u32], new: u32) {
        if let Teller::Connector(connector) = self {
            connector.forget(new);
            // As above.
            let _ = connector.narrow(pids);
        }
    }

    /// To be watched, and heard when something can be read from it.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Teller::Connector(connector) => Some(connector.as_fd()),
            Teller::Pidfd | Teller::Nobody(_) => None,
        }
    }

    /// Takes in what has come to the descriptor.
    pub fn hear(&mut self) {
        if let Teller::Connector(connector) = self {
            connector.read();
        }
    }

    /// How a process ended that was seen to have, so long ago.
    pub fn answer(
        &mut self,
        proc: &Proc,
        process: Process,
        pidfd: &OwnedFd,
        ago: Duration,
    ) -> Answer {
        let unknown =
            |why: &str| Answer::Unknown(format!("its parent has collected it, and {why}"));
        if let Teller::Pidfd = self {
            return status(proc, process, pidfd).map_or_else(
                || unknown("the kernel does not say how it ended"),
                Answer::Status,
            );
        }
        if let Some(raw) = zombie(proc, process) {
            return Answer::Status(status_of_wait(raw));
        }
        let connector = match self {
            Teller::Pidfd => return Answer::NotYet,
            Teller::Nobody(why) => return unknown(why),
            Teller::Connector(connector) => connector,
        };
        match connector.told(process.pid) {
            Told::Nothing if ago < GIVES_UP => Answer::NotYet,
            Told::Nothing if connector.has_lost() => {
                unknown("more processes ended at once than the kernel could tell")
            }
            Told::Nothing => unknown("the kernel did not tell its end"),
            Told::Status(_) | Told::Unclear if ago < SETTLES => Answer::NotYet,
            Told::Status(raw) => Answer::Status(status_of_wait(raw)),
            Told::Unclear => unknown("its threads ended one by one, each in its own way"),
        }
    }

    /// As [`Teller::answer`], of a process with a single thread: the first word of it is the last.
    pub fn answer_of_one_thread(
        &mut self,
        proc: &Proc,
        process: Process,
        pidfd: &OwnedFd,
        ago: Duration,
    ) -> Answer {
        self.answer(proc, process, pidfd, ago.max(SETTLES))
    }

    /// When to ask again that has said *not yet*, if nothing happens before: so long after the end.
    pub fn again(ago: Duration) -> Duration {
        if ago < SETTLES { SETTLES } else { GIVES_UP }
    }

    /// As [`Teller::answer`], waiting for it.
    pub fn await_answer(&mut self, proc: &Proc, process: Process, pidfd: &OwnedFd) -> Answer {
        let first = self.answer(proc, process, pidfd, Duration::ZERO);
        if first != Answer::NotYet {
            return first;
        }
        std::thread::sleep(SETTLES);
        match self.answer(proc, process, pidfd, SETTLES) {
            Answer::NotYet => self.answer(proc, process, pidfd, GIVES_UP),
            answer => answer,
        }
    }
}

/// A test may have this kernel be an older one.
#[cfg(feature = "failpoints")]
fn pidfd_is_used() -> bool {
    std::env::var_os("RECOVERD_NO_PIDFD_STATUS").is_none()
}

#[cfg(not(feature = "failpoints"))]
fn pidfd_is_used() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{process::Command, time::Duration};

    #[test]
    fn a_wait_status_is_an_exit_code_or_a_signal() {
        for (raw, status) in [
            (0, 0),
            (0x2a00, 42),
            (0xff00, 255),
            (9, 137),
            (0x86, 134),
            (37, 165),
        ] {
            assert_eq!(status_of_wait(raw), status, "{raw:#x}");
        }
    }

    #[test]
    fn the_status_of_a_zombie_and_of_what_was_collected_is_seen() {
        let proc = Proc::new("/proc");
        let mut child = Command::new("sh").args(["-c", "exit 23"]).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let stat = proc.stat(pid);
        let Seen::Present(stat) = stat else {
            panic!("{stat:?}")
        };
        let process = Process {
            pid: child.id(),
            start_time: stat.id.start_time,
        };
        let pidfd = open(&proc, process).unwrap();
        assert!(await_end(&pidfd, Duration::from_secs(20)));
        assert_eq!(status(&proc, process, &pidfd), Some(23));
        child.wait().unwrap();
        // Since Linux 6.15.
        let later = status(&proc, process, &pidfd);
        assert!(matches!(later, Some(23) | None), "{later:?}");
        let other = Process {
            pid: std::process::id(),
            start_time: 1,
        };
        assert!(open(&proc, other).unwrap_err().contains("another process"));
    }
}
