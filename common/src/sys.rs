//! The only unsafe code of this crate: what neither std nor nix offers safely, and both programs
//! need.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

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

/// A duplicate of the descriptor `number` of the process of `pidfd`; close-on-exec.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The wait status of the process of `pidfd`, once its parent has collected it; none before, and
/// none from a kernel older than 6.15.
pub fn pidfd_wait_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    /// `struct pidfd_info` of Linux 6.13, whose last field came with 6.15.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    /// `_IOWR(0xFF, 11, struct pidfd_info)`.
    const PIDFD_GET_INFO: libc::Ioctl = 0xC040_FF0B;
    let mut info = Info {
        mask: PIDFD_INFO_EXIT,
        ..Info::default()
    };
    // SAFETY: the request's number says the size of the structure that the kernel fills.
    let asked = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (asked == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

/// The number of the slave whose terminal's master is `fd`; none for anything else.
pub fn terminal_number(fd: BorrowedFd<'_>) -> Option<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes one unsigned int.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
    (asked == 0).then_some(number)
}

/// Descriptors that the kernel has just made for us, out of a message or an accept: nobody else
/// knows their numbers, and they are taken once.
pub fn received(numbers: &[RawFd]) -> Vec<OwnedFd> {
    let own = |number: &RawFd| {
        // SAFETY: see above; the callers give what recvmsg and accept gave them, once.
        unsafe { OwnedFd::from_raw_fd(*number) }
    };
    numbers.iter().map(own).collect()
}

/// A socket for the kernel's connectors, neither blocking nor inherited. nix does not know their
/// protocol.
pub fn connector_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_CONNECTOR) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the kernel queue on `socket` only what `program`, in classic BPF, lets through.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    let size = libc::socklen_t::try_from(size_of_val(&program)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads one sock_fprog, and `len` instructions where it points, of which it
    // makes a copy; it writes to neither.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether this kernel's pidfds tell how a process ended after it was collected: tried out on a
/// child that ends at once.
pub fn pidfd_tells_status() -> io::Result<bool> {
    // SAFETY: the child does nothing but end, without running what this process has registered;
    // that is allowed whatever the other threads of this one are doing.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(42) };
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pidfd = pidfd_open(pid);
    let mut status = 0;
    loop {
        // SAFETY: waitpid writes one number.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(pidfd_wait_status(pidfd?.as_fd()) == Some(status))
}

/// Makes `command` start with `files` as its descriptors 3, 4, 5… and no others, in a session of its own and,
/// when `core` is set, with a core scheduling cookie of its own.
pub fn give(command: &mut Command, files: &[&OwnedFd], core: bool) -> io::Result<()> {
    let mut pairs = Vec::with_capacity(files.len());
    // Out of the way of all targets, so that no dup2 closes a source that is still needed.
    let beyond = RawFd::try_from(files.len()).map_err(io::Error::other)? + 64;
    for (target, file) in (3..).zip(files) {
        let source = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(beyond))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_gets_the_signal_and_a_number_without_process_is_refused() {
        let mut child = std::process::Command::new("sleep")
            .arg("300")
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(i32::try_from(child.id()).unwrap()).unwrap();
        pidfd_signal(pidfd.as_fd(), libc::SIGTERM).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(pidfd_signal(pidfd.as_fd(), libc::SIGTERM).is_err());
        assert!(pidfd_open(-1).is_err() && pidfd_open(i32::MAX).is_err());
    }
}
