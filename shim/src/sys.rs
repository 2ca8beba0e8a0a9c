//! The only unsafe code of the shim: what neither std nor nix offers safely.

// ---- launch: start, delete, context ----

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// Takes over a descriptor that this process was started with, and marks it close-on-exec.
/// `None` when there is no such descriptor. Call it once per number, before anything is opened.
pub fn inherited(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_SETFD on any number touches no memory; on a closed one it fails with EBADF.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if set == -1 {
        return None;
    }
    // SAFETY: the descriptor is open (fcntl succeeded), and nobody in this process owns it: it was
    // there before main and the caller takes each number once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes `command` start with `files` as its descriptors 3, 4, 5… and no others, in a session of its own and,
/// when `core` is set, with a core scheduling cookie of its own.
pub fn give(command: &mut Command, files: &[&OwnedFd], core: bool) -> io::Result<()> {
    let mut pairs = Vec::with_capacity(files.len());
    for (target, file) in (3..).zip(files) {
        // Out of the way of all targets, so that no dup2 closes a source that is still needed.
        let source = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64))?;
        // SAFETY: fcntl has just opened `source` for us.
        pairs.push((unsafe { OwnedFd::from_raw_fd(source) }, target));
    }
    let prepare = move || {
        for (source, target) in &pairs {
            // SAFETY: dup2 touches no memory; whatever was open at `target` in this freshly forked
            // child is close-on-exec and of no use to the program it becomes.
            if unsafe { libc::dup2(source.as_raw_fd(), *target) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        let first = 3u32.saturating_add(u32::try_from(pairs.len()).unwrap_or(0));
        // Whatever else leaked in from whoever started us goes at exec. Before Linux 5.11 there is
        // no such call, and the leak stays.
        // SAFETY: close_range with CLOSE_RANGE_CLOEXEC takes three numbers and closes nothing now.
        unsafe {
            libc::syscall(
                libc::SYS_close_range,
                first,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        // SAFETY: setsid touches no memory. A freshly forked child leads no group: it succeeds.
        if unsafe { libc::setsid() } == -1 {
            return Err(io::Error::last_os_error());
        }
        if core {
            const PIDTYPE_PGID: libc::c_ulong = 2;
            // SAFETY: PR_SCHED_CORE with PR_SCHED_CORE_CREATE takes four numbers and no pointer.
            let made = unsafe {
                libc::prctl(
                    libc::PR_SCHED_CORE,
                    libc::PR_SCHED_CORE_CREATE,
                    0,
                    PIDTYPE_PGID,
                    0,
                )
            };
            if made == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls on memory that it owns and
    // allocates nothing (`last_os_error` only reads errno).
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// Takes the exclusive `flock` of `file` without waiting; false when somebody else has it. Not
/// nix's `Flock`, whose drop unlocks: the lock has to pass to the daemon with the descriptor.
pub fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock touches no memory, and the descriptor is open as long as `file` is borrowed.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        error => Err(error),
    }
}

/// A descriptor of the process `pid`; it stays of that process when the number is reused.
pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends `signal` to the process of `pidfd`.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open as long as it is borrowed, and a null siginfo is allowed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    if sent == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the scheduling priority of this process.
pub fn set_nice(nice: libc::c_int) -> io::Result<()> {
    // SAFETY: setpriority takes three numbers; 0 is the calling process.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Runs `work` in a child whose descriptors 0, 1 and 2 are `/dev/null`, and returns its pid; the
/// child ends with what `work` returns. For calls that may wait for a device for ever: the parent
/// may leave without it, and nobody waits for an end of file on a pipe that it holds. Only for a
/// process with one thread, because the child goes on using the heap.
pub fn apart(work: impl FnOnce() -> u8) -> io::Result<libc::pid_t> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: the process has one thread (see above), so no lock of the heap is held by another,
    // and the child is an ordinary copy of this process.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            for target in 0..3 {
                // SAFETY: dup2 touches no memory. Whoever owned these numbers is never run again
                // in this child.
                unsafe { libc::dup2(null.as_raw_fd(), target) };
            }
            let status = work();
            // SAFETY: _exit does not return and runs no destructor of the parent's objects.
            unsafe { libc::_exit(libc::c_int::from(status)) }
        }
        pid => Ok(pid),
    }
}

// ---- end of launch ----
