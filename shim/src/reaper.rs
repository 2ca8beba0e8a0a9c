//! Children that have exited: looked at first, collected after the record says it. A shim that
//! dies between the two leaves a zombie whose status the next owner can still read.

use nix::unistd::Pid;
use recoverd_common::{read::read_text, seen::Seen};

use crate::sys::{self, Ended};

/// An exited child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// Not reused before [`collect`].
    pub pid: Pid,
    /// Exit code, or 128 + signal.
    pub status: u32,
}

/// The next exited child, or this one if it has exited; left uncollected.
pub fn peek(which: Option<Pid>) -> Option<Exited> {
    let (pid, ended) = sys::exited_child(which, false)?;
    let status = match ended {
        Ended::Exited(code) => code & 0xff,
        Ended::Signalled(signal) => 128 + signal,
    };
    Some(Exited {
        pid,
        status: u32::try_from(status).unwrap_or(0),
    })
}

/// Lets the kernel forget an exited child.
pub fn collect(pid: Pid) {
    let _ = sys::exited_child(Some(pid), true);
}

/// Field 22 of `/proc/<pid>/stat`; 0 if the process has gone.
pub fn start_time(pid: Pid) -> u64 {
    let path = format!("/proc/{pid}/stat");
    match read_text(path.as_ref(), 4096) {
        Seen::Present(stat) => stat_start_time(&stat).unwrap_or(0),
        Seen::Absent | Seen::Unknown(_) => 0,
    }
}

/// The name in brackets may contain anything, brackets too.
fn stat_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        for name in ["sh", "a) b", "((", ") S 1"] {
            let stat = format!("42 ({name}) {rest}");
            assert_eq!(stat_start_time(&stat), Some(4711), "{name}");
        }
        assert_eq!(stat_start_time("42 (x"), None);
        assert_ne!(start_time(Pid::this()), 0);
        assert_eq!(start_time(Pid::from_raw(i32::MAX)), 0);
    }
}
