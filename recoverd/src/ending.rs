//! Ends exactly one process, for whoever was allowed to: the descriptor is opened first and the
//! start time looked at after, so that the number cannot come to mean another one in between.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use recoverd_common::{
    failpoint,
    proc::{Proc, ProcessId},
    seen::Seen,
    sys,
};

use crate::permit::Kill;

/// Why a process was not ended.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEnded {
    /// It is not there any more, or cannot be told; it got no signal.
    #[error("{}: {why}", .id.pid)]
    Changed {
        /// Which.
        id: ProcessId,
        /// What it is instead.
        why: String,
    },
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// Sends `signals`, each only if the process outlived the one before for `patience`; the one that
/// ended it.
pub fn end(
    proc: &Proc,
    id: ProcessId,
    signals: &[Signal],
    patience: Duration,
    _leave: &Kill,
) -> Result<Signal, NotEnded> {
    let changed = |why: String| NotEnded::Changed { id, why };
    let pidfd = match sys::pidfd_open(id.pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
            return Err(changed("it ended".into()));
        }
        Err(error) => {
            return Err(NotEnded::Failed(format!(
                "open process {}: {error}",
                id.pid
            )));
        }
    };
    match proc.living(id) {
        Seen::Present(_) => {}
        Seen::Absent => return Err(changed("it ended, its number may be another one's".into())),
        Seen::Unknown(why) => return Err(changed(why)),
    }
    for signal in signals {
        failpoint!("repair.signal.before");
        let sent = sys::pidfd_signal(pidfd.as_fd(), *signal as libc::c_int);
        failpoint!("repair.signal.after");
        match sent {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => {
                let why = format!("send {signal:?} to {}: {error}", id.pid);
                return Err(NotEnded::Failed(why));
            }
        }
        if ended(&pidfd, patience) {
            return Ok(*signal);
        }
    }
    Err(NotEnded::Failed(format!(
        "{} lives on after {signals:?}",
        id.pid
    )))
}

/// A pidfd becomes readable when its process has ended.
fn ended(pidfd: &OwnedFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
