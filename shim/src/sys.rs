//! The only unsafe code of the shim: what neither std nor nix offers safely.

// ---- launch: start, delete, context ----

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

pub use recoverd_common::sys::{give, pidfd_getfd, pidfd_open, pidfd_signal, terminal_number};

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

/// How a `flock` is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// By one.
    Alone,
    /// By any number who hold it so.
    Shared,
}

/// Takes the `flock` of `file` without waiting; false when somebody is in the way. Not nix's
/// `Flock`, whose drop unlocks: the lock has to pass to the daemon with the descriptor.
pub fn try_lock(file: &File, hold: Hold) -> io::Result<bool> {
    let how = match hold {
        Hold::Alone => libc::LOCK_EX,
        Hold::Shared => libc::LOCK_SH,
    };
    // SAFETY: flock touches no memory, and the descriptor is open as long as `file` is borrowed.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        error => Err(error),
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

/// Runs `work` in a child whose descriptors 0, 1 and 2 are `/dev/null` and which has no others
/// (above all not the lock), and returns its pid; the child ends with what `work` returns. For
/// calls that may wait for a device for ever: the parent may leave without it, and nobody waits
/// for an end of file on a pipe that it holds.
pub fn apart(work: impl FnOnce() -> u8) -> io::Result<Pid> {
    let null: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into();
    match fork()? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = match keep_only(&[&null, &null, &null], &null) {
                Ok(_) => work(),
                Err(_) => u8::MAX,
            };
            // SAFETY: _exit does not return and runs no destructor of the parent's objects.
            unsafe { libc::_exit(libc::c_int::from(status)) }
        }
    }
}

// ---- end of launch ----

// ---- serve ----

use nix::unistd::{ForkResult, Pid};

/// How a child ended, as the kernel says it: a signal may be a real-time one, which nix's types
/// cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(libc::c_int),
    /// By this signal.
    Signalled(libc::c_int),
}

/// An exited child, any or the one given, that is not collected unless `collect` says so.
pub fn exited_child(which: Option<Pid>, collect: bool) -> Option<(Pid, Ended)> {
    let (kind, id) = match which {
        None => (libc::P_ALL, 0),
        Some(pid) => (libc::P_PID, libc::id_t::try_from(pid.as_raw()).ok()?),
    };
    let keep = if collect { 0 } else { libc::WNOWAIT };
    let flags = libc::WEXITED | libc::WNOHANG | keep;
    // SAFETY: siginfo_t is plain numbers; all zero is what waitid leaves when nobody has exited.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: waitid writes one siginfo_t.
    if unsafe { libc::waitid(kind, id, &raw mut info, flags) } == -1 {
        // ECHILD: no children. WNOHANG is never interrupted.
        return None;
    }
    // SAFETY: waitid fills these fields, or they are zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return None;
    }
    let ended = match info.si_code {
        libc::CLD_EXITED => Ended::Exited(status),
        _ => Ended::Signalled(status),
    };
    Some((Pid::from_raw(pid), ended))
}

/// Forks. Only for a process with one thread, which the shim is: the child may then do whatever
/// the parent may.
pub fn fork() -> io::Result<ForkResult> {
    // SAFETY: there is one thread (SPEC, section 8), so no lock can be held by another one.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// In a child: makes `files` its descriptors 0, 1, 2…, inherited by what it executes, and `last`
/// the one after, closed when it executes something; everything else is closed. Gives the number
/// of `last`.
pub fn keep_only(files: &[&OwnedFd], last: &OwnedFd) -> io::Result<RawFd> {
    let first_free = RawFd::try_from(files.len()).map_err(io::Error::other)?;
    let mut moved = Vec::with_capacity(files.len() + 1);
    for file in files.iter().chain([&last]) {
        // Out of the way of all targets, so that no dup2 closes a source that is still needed.
        moved.push(nix::fcntl::fcntl(
            file,
            nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(first_free + 64),
        )?);
    }
    for (target, source) in (0..).zip(&moved) {
        let flags = if target == first_free {
            libc::O_CLOEXEC
        } else {
            0
        };
        // SAFETY: dup3 touches no memory; what was open at `target` belongs to the parent's
        // structures, which this child does not use any more.
        if unsafe { libc::dup3(*source, target, flags) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    let from = libc::c_uint::try_from(first_free + 1).map_err(io::Error::other)?;
    // SAFETY: close_range touches no memory; as above.
    if unsafe { libc::syscall(libc::SYS_close_range, from, libc::c_uint::MAX, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(first_free)
}

/// In a child: puts `file` at `number`, inherited by what it executes.
pub fn place(file: OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2 touches no memory; `number` is one of those that `keep_only` has filled.
    if unsafe { libc::dup2(file.as_raw_fd(), number) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// In a child: closes what [`keep_only`] put at `number`.
pub fn drop_kept(number: RawFd) {
    // SAFETY: the child alone uses the number, and not after this.
    unsafe { libc::close(number) };
}

/// In a child: writes to a descriptor by its number, ends the process.
pub fn last_words(fd: RawFd, text: &[u8], status: i32) -> ! {
    // SAFETY: the pointer and the length are of one slice; a closed descriptor gives EBADF.
    unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends this process without running what the parent has registered.
    unsafe { libc::_exit(status) }
}

/// In a child: a descriptor that [`keep_only`] put at `number`, borrowed for as long as it lives.
pub fn kept<'a>(number: RawFd) -> BorrowedFd<'a> {
    // SAFETY: `keep_only` has just opened it, and nothing in the child closes it.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// In a child: signals as every program expects them at its start.
pub fn default_signals() {
    // SAFETY: restores the default action, no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let none = nix::sys::signal::SigSet::empty();
    // Fails for a wrong `how` only.
    let _ = none.thread_set_mask();
}

/// Sets the size of the terminal whose master is `fd`.
pub fn set_window_size(fd: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes waiting in a pipe.
pub fn waiting_bytes(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A descriptor that came with a message.
pub fn received(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just opened it for us, and the message names it once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Signals a process group that our child leads; the child is not reaped yet.
pub fn signal_group(leader: Pid, signal: libc::c_int) {
    // SAFETY: kill takes two numbers. The group exists as long as its leader is not reaped.
    unsafe { libc::kill(-leader.as_raw(), signal) };
}

/// Makes descriptor 2 a duplicate of `fd`: where the message of a panic goes.
pub fn become_stderr(fd: BorrowedFd<'_>) {
    // SAFETY: dup2 touches no memory; descriptor 2 is /dev/null and nobody owns it.
    unsafe { libc::dup2(fd.as_raw_fd(), 2) };
}

/// Unmaps what is mapped from our executable and its libraries and was never written, and gives
/// free memory back to the kernel: what is needed comes back with the next page fault, from the
/// page cache.
pub fn trim() {
    // SAFETY: gives back free pages of the heap; there is one thread.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback is called with valid entries before this returns, and unwinds never.
    unsafe { libc::dl_iterate_phdr(Some(unmap_unwritten), std::ptr::null_mut()) };
}

/// Drops the pages of one loaded object's segments that nobody can write: code and constants.
/// Constants that relocation has written are in a writable segment (`PT_GNU_RELRO` protects a part
/// of that only later), so they stay.
unsafe extern "C" fn unmap_unwritten(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: usize = 4096;
    // SAFETY: the linker gives a valid entry for the time of this call.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: so many headers are there, mapped as long as the object is, which is for ever.
    let headers =
        unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let base = usize::try_from(info.dlpi_addr).unwrap_or(0);
    let number = |value| usize::try_from(value).unwrap_or(0);
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        // Whole pages of this segment only, and at most the file's part of it.
        let start = base.wrapping_add(number(header.p_vaddr));
        let end = start.saturating_add(number(header.p_filesz)) / PAGE * PAGE;
        let start = start.next_multiple_of(PAGE);
        if start < end {
            // SAFETY: the range is mapped from a file, privately and not writable, and was never
            // written: dropping its pages loses nothing, they are read from the file again. Of the
            // kernel's own page of code (vdso) the same holds, or the call fails.
            unsafe {
                libc::madvise(
                    std::ptr::without_provenance_mut(start),
                    end.saturating_sub(start),
                    libc::MADV_DONTNEED,
                )
            };
        }
    }
    0
}

/// A detached copy of the mount that `path` is on, `path` its root.
pub fn clone_mount(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a C string that outlives the call.
    let got = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if got == -1 {
        return Err(io::Error::last_os_error());
    }
    let number = RawFd::try_from(got).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Shows the files of a detached mount with the ids that user namespace `of` gives them.
pub fn map_ids(mount: BorrowedFd<'_>, of: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP
            | if read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            },
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(of.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the path is an empty C string; the kernel reads as many bytes as the last argument
    // says, which is the structure's size.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Mounts a detached mount on the folder that is open as `place`.
pub fn attach_mount(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty C strings.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The number of a loop device that nobody uses just now, by `/dev/loop-control`.
pub fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and touches no memory.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// What LOOP_CONFIGURE reads: `struct loop_config` of linux/loop.h, what we leave zero in a lump.
#[repr(C)]
struct LoopConfig {
    image: u32,
    block_size: u32,
    /// Device, inode, offset and limit.
    place: [u64; 5],
    /// Number and encryption.
    kind: [u32; 3],
    flags: u32,
    name: [u8; 64],
    encryption: [u8; 96],
    unused: [u64; 10],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// Has a free loop device show `image`, for as long as somebody has it open or mounted. EBUSY:
/// somebody else was first. Whoever lists devices sees (the beginning of) `name`.
pub fn set_loop_device(
    device: BorrowedFd<'_>,
    image: BorrowedFd<'_>,
    name: &Path,
    read_only: bool,
) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
    const READ_ONLY: u32 = 1;
    const AUTOCLEAR: u32 = 4;
    let mut config = LoopConfig {
        image: u32::try_from(image.as_raw_fd()).map_err(io::Error::other)?,
        block_size: 0,
        place: [0; 5],
        kind: [0; 3],
        flags: AUTOCLEAR | if read_only { READ_ONLY } else { 0 },
        name: [0; 64],
        encryption: [0; 96],
        unused: [0; 10],
    };
    // The last byte stays zero: the kernel takes a string.
    let place = config.name.iter_mut().take(63);
    for (to, from) in place.zip(name.as_os_str().as_bytes()) {
        *to = *from;
    }
    // SAFETY: LOOP_CONFIGURE reads one loop_config, whose size and layout the structure has.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

// ---- end of serve ----
