//! How a process ended that somebody else is the parent of.
//!
//! Its pidfd becomes readable when all its threads have ended. Until its parent (mostly PID 1)
//! collects it, it is a zombie whose wait status stands in field 52 of its `stat`; from then on
//! Linux 6.15 and later tell it through the pidfd. On older kernels the connector has it. Between
//! looking here and there the parent may collect it, so both are asked again.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
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
    let pidfd = sys::pidfd_open(pid).map_err(|_| gone())?;
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
pub fn await_end(pidfd: &OwnedFd, longest: std::time::Duration) -> bool {
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
