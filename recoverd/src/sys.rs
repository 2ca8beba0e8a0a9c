//! The only `unsafe` of this crate: system calls that neither std nor nix offers.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A descriptor of the process that has this pid now. It never leads to a later one with the same
/// number; whether it is the one that was meant has to be checked after this call.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process behind `pidfd`.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: nix::sys::signal::Signal) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as it is borrowed; a null siginfo asks the kernel to
    // fill it in as kill(2) does.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
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
        pidfd_send_signal(&pidfd, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(pidfd_send_signal(&pidfd, nix::sys::signal::Signal::SIGTERM).is_err());
        assert!(pidfd_open(-1).is_err() && pidfd_open(i32::MAX).is_err());
    }
}
