//! What the threads of a stopped process were at when they stopped.

use std::fs;

use super::{Proc, SMALL, parse_stat};
use crate::{
    read::{absent_or_unknown, read_file, read_text},
    seen::Seen,
};

/// How far a stop has come, and where it met the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Some thread runs still, or waits where no signal reaches it.
    Pending,
    /// Every thread was waiting for something to happen: nothing was half done.
    AtRest,
    /// A thread was on its way.
    Midway,
}

/// System calls in which a thread waits and has nothing in its hands.
const WAITS: &[i64] = &[
    libc::SYS_futex,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_waitid,
    libc::SYS_wait4,
    // What the kernel makes of some of these when a stop interrupts them a second time.
    libc::SYS_restart_syscall,
];

impl Proc {
    /// Where a stop met process `pid`; *absent* when that is gone.
    pub fn stop(&self, pid: i32) -> Seen<Stop> {
        let threads = match fs::read_dir(self.path(pid, "task")) {
            Ok(threads) => threads,
            Err(error) => return absent_or_unknown(&error),
        };
        let mut stop = Stop::AtRest;
        for thread in threads.flatten() {
            let folder = thread.path();
            let stat = read_file(&folder.join("stat"), SMALL)
                .map(|bytes| parse_stat(&String::from_utf8_lossy(&bytes)));
            match stat {
                Seen::Present(Some(stat)) if !stat.alive() => continue,
                Seen::Present(Some(stat)) if matches!(stat.state, 'T' | 't') => {}
                Seen::Present(_) => return Seen::Present(Stop::Pending),
                // A thread that has ended meanwhile.
                Seen::Absent => continue,
                Seen::Unknown(why) => return Seen::Unknown(why),
            }
            match read_text(&folder.join("syscall"), SMALL) {
                Seen::Present(text) if waits(&text) => {}
                Seen::Present(_) => stop = Stop::Midway,
                Seen::Absent => {}
                Seen::Unknown(why) => return Seen::Unknown(why),
            }
        }
        Seen::Present(stop)
    }
}

/// Whether a line of `/proc/<pid>/task/<tid>/syscall` (number, arguments; -1 outside of any call)
/// is of a thread that waits.
fn waits(line: &str) -> bool {
    let number = line.split_ascii_whitespace().next();
    number
        .and_then(|number| number.parse().ok())
        .is_some_and(|number| WAITS.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_waits_in_a_call_that_waits_and_nowhere_else() {
        let line = |number| format!("{number} 0x1 0x2 0x0 0x0 0x0 0x0 0x7ffe 0x7f31\n");
        assert!(waits(&line(libc::SYS_futex)));
        assert!(waits(&line(libc::SYS_epoll_pwait)));
        assert!(!waits(&line(libc::SYS_read)));
        assert!(!waits(&line(libc::SYS_write)));
        assert!(!waits("-1 0x7ffe 0x7f31\n"));
        assert!(!waits("running\n"));
        assert!(!waits(""));
    }
}
