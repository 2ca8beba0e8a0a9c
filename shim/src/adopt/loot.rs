//! What only an unresponsive predecessor has, or had: taken from it while it is stopped (or kept by
//! somebody else while it died), held until its
//! successor has its own, so that no writer of the workload meets a pipe without a reader and no
//! reader of it an end of file; and terminals, which nobody can open again.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use nix::fcntl::{FcntlArg, fcntl};
use recoverd_common::{proc::Proc, seen::Seen};

use crate::{sys, witness};

/// More descriptors than any shim has.
const MAX_TAKEN: usize = 4096;

/// A file as the kernel knows it, whatever it is called.
type FileId = (u64, u64);

/// Descriptors of a predecessor.
#[derive(Debug, Default)]
pub struct Loot {
    /// Pipes and fifos, by what they are; both ends may be there.
    pipes: Vec<(FileId, OwnedFd)>,
    /// Masters: the file system that the terminal is of, its number there.
    terminals: Vec<((u64, u32), OwnedFd)>,
    /// These are all that a predecessor had while it was stopped.
    whole: bool,
}

/// Takes every pipe, fifo and terminal of the stopped process `pid`, whose pidfd this is.
pub fn take(proc: &Path, pid: i32, pidfd: &OwnedFd) -> Loot {
    let mut loot = Loot::default();
    let Seen::Present(descriptors) = Proc::new(proc).descriptors(pid) else {
        return loot;
    };
    loot.whole = descriptors.len() <= MAX_TAKEN;
    for descriptor in descriptors.into_iter().take(MAX_TAKEN) {
        let target = descriptor.target.to_string_lossy();
        let path = proc.join(format!("{pid}/fd/{}", descriptor.number));
        let fifo = || fs::metadata(&path).is_ok_and(|meta| meta.file_type().is_fifo());
        // A terminal's master is called by whichever multiplexer it was opened through.
        if !(target.contains("ptmx") || fifo()) {
            continue;
        }
        let Ok(fd) = sys::pidfd_getfd(pidfd.as_fd(), descriptor.number) else {
            loot.whole = false;
            continue;
        };
        loot.add(fd);
    }
    // One that has ended meanwhile shows no descriptors, or not all.
    loot.whole &= !witness::has_ended(pidfd);
    loot
}

impl Loot {
    /// Keeps a descriptor if it is a pipe, a fifo or a terminal's master.
    pub fn add(&mut self, fd: OwnedFd) {
        let file = File::from(fd);
        let Ok(meta) = file.metadata() else {
            return;
        };
        let fd = OwnedFd::from(file);
        if meta.file_type().is_fifo() {
            self.pipes.push(((meta.dev(), meta.ino()), fd));
        } else if let Some(number) = sys::terminal_number(fd.as_fd()) {
            self.terminals.push(((meta.dev(), number), fd));
        }
    }

    /// Adds another's.
    pub fn append(&mut self, mut other: Self) {
        self.pipes.append(&mut other.pipes);
        self.terminals.append(&mut other.terminals);
        self.whole |= other.whole;
    }

    /// True if the predecessor had an end of this pipe.
    pub fn has_pipe(&self, id: FileId) -> bool {
        self.pipes.iter().any(|(other, _)| *other == id)
    }

    /// True if the predecessor could read this pipe.
    pub fn reads_pipe(&self, id: FileId) -> bool {
        self.opens_pipe(id, libc::O_WRONLY)
    }

    /// True if the predecessor lived, and for certain could not write to this pipe. A stock shim
    /// keeps the read end of a stdin all along.
    pub fn has_no_writer(&self, id: FileId) -> bool {
        self.whole && !self.opens_pipe(id, libc::O_RDONLY)
    }

    /// Has an end of this pipe that is not for `other` alone. What the kernel does not say counts as
    /// such: nobody else is taken for a reader then, and nothing for ended.
    fn opens_pipe(&self, id: FileId, other: libc::c_int) -> bool {
        let only = |fd: &OwnedFd| {
            fcntl(fd, FcntlArg::F_GETFL).is_ok_and(|flags| flags & libc::O_ACCMODE == other)
        };
        let mut pipes = self.pipes.iter();
        pipes.any(|(pipe, fd)| *pipe == id && !only(fd))
    }

    /// The read end of the pipe without a name that has this inode.
    pub fn reader_of(&self, pipe: u64) -> Option<OwnedFd> {
        let ends = self.pipes.iter().filter(|((_, inode), _)| *inode == pipe);
        let mut readers = ends.map(|(_, fd)| fd).filter(|fd| {
            let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            let unnamed = name.is_ok_and(|name| name.to_string_lossy().starts_with("pipe:"));
            let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap_or(libc::O_WRONLY);
            unnamed && flags & libc::O_ACCMODE != libc::O_WRONLY
        });
        readers.next()?.try_clone().ok()
    }

    /// The master of the terminal that process `pid` has as one of its first three descriptors.
    /// Every container has a terminal file system of its own, so the number alone says nothing.
    pub fn master_of(&mut self, proc: &Path, pid: u32) -> Option<OwnedFd> {
        let found = (0..3).find_map(|number| {
            let meta = fs::metadata(proc.join(format!("{pid}/fd/{number}"))).ok()?;
            let slave = meta.file_type().is_char_device() && is_slave(meta.rdev());
            let id = (meta.dev(), libc::minor(meta.rdev()));
            let at = self.terminals.iter().position(|(other, _)| *other == id);
            at.filter(|_| slave)
        })?;
        Some(self.terminals.swap_remove(found).1)
    }
}

/// Unix98 slaves have the majors 136 to 143.
fn is_slave(device: u64) -> bool {
    (136..=143).contains(&libc::major(device))
}
