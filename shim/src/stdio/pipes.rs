//! Pipes and fifos: opening them so that nobody waits and nobody dies of SIGPIPE, and closing
//! them so that no byte is lost.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Gid, Uid, fchown, pipe2},
};

use serde::{Deserialize, Serialize};

use crate::{carry, sys};

/// A fifo kept open.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hold {
    /// The fifo.
    #[serde(with = "carry::fd")]
    pub(super) fifo: OwnedFd,
    /// Write-only now, and looked at for a reader.
    pub(super) last_words: bool,
}

/// A pipe whose write end is opened read-write: its writer is its own reader.
pub(super) fn two_way_pipe(owner: (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    own(&read, owner);
    let both = reopen(&write, true, true, OFlag::empty())?;
    Ok((read, both))
}

/// Opens a client's fifo read-write, which never waits.
pub(super) fn open_fifo(path: impl AsRef<Path>, owner: (u32, u32)) -> io::Result<OwnedFd> {
    let path = path.as_ref();
    // Looked at first: opening a device could do something.
    if !fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::other("is not a fifo"));
    }
    let fifo = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    if !fifo.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("is not a fifo"));
    }
    let fifo = OwnedFd::from(fifo);
    own(&fifo, owner);
    Ok(fifo)
}

/// Another opening of the same pipe or fifo.
pub(super) fn reopen(fd: &OwnedFd, read: bool, write: bool, flags: OFlag) -> io::Result<OwnedFd> {
    File::options()
        .read(read)
        .write(write)
        .custom_flags(flags.bits())
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map(OwnedFd::from)
}

/// Gives a pipe to the owner that the options name. Root is the owner anyway.
pub(super) fn own(fd: &OwnedFd, (uid, gid): (u32, u32)) {
    if (uid, gid) != (0, 0) {
        // A fifo on a file system that cannot is still readable by root.
        let _ = fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    }
}

pub(super) fn set_nonblocking(fd: &OwnedFd) {
    if let Ok(flags) = fcntl(fd, FcntlArg::F_GETFL) {
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        let _ = fcntl(fd, FcntlArg::F_SETFL(flags));
    }
}

/// The read end of a pipe once more, for somebody who waits at it: by an opening of its own, because
/// ours may not be waited at. That does not wait either, should the last writer have gone.
pub(super) fn read_end(pipe: &OwnedFd) -> io::Result<OwnedFd> {
    let read = reopen(pipe, true, false, OFlag::O_NONBLOCK)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(read)
}

/// A pipe or a fifo, and no terminal or file.
pub(super) fn is_pipe(fd: &OwnedFd) -> bool {
    nix::sys::stat::fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO)
}

/// The writer of `fifo` has gone. While something is in it, it has to stay open; write-only, so that
/// whoever reads it is its only reader.
pub(super) fn last_words(fifo: OwnedFd) -> Option<Hold> {
    if !is_pipe(&fifo) {
        return None;
    }
    // Out of descriptors: closing would lose bytes, so it stays as it is until Delete.
    let Ok(writer) = reopen(&fifo, false, true, OFlag::O_NONBLOCK) else {
        return Some(Hold {
            fifo,
            last_words: false,
        });
    };
    drop(fifo);
    (!is_done(&writer)).then_some(Hold {
        fifo: writer,
        last_words: true,
    })
}

/// True if this read end has no writer and nothing to read: a logger that ends with its
/// container is no dead logger.
pub(super) fn has_ended(reader: &OwnedFd) -> bool {
    let mut wait = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut wait, PollTimeout::ZERO);
    let [entry] = &wait;
    entry.revents() == Some(PollFlags::POLLHUP)
}

/// True if nothing is lost by closing this write end: all is read. Not as soon as somebody has the
/// other end: that may be a duplicate of what we had ourselves, with whoever upgrades or supervises
/// us, and nobody who reads. A reader sees no end before it has read everything anyway.
pub(super) fn is_done(writer: &OwnedFd) -> bool {
    matches!(sys::waiting_bytes(writer.as_fd()), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn fifo(dir: &tempfile::TempDir) -> std::path::PathBuf {
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    fn reader(path: &Path) -> File {
        let nonblocking = OFlag::O_NONBLOCK.bits();
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(nonblocking)
            .open(path)
            .unwrap()
    }

    #[test]
    fn last_words_wait_for_a_reader_and_then_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let held = open_fifo(&path, (0, 0)).unwrap();
        File::from(reopen(&held, true, true, OFlag::empty()).unwrap())
            .write_all(b"last words")
            .unwrap();
        let hold = last_words(held).expect("nobody has read");
        assert!(!is_done(&hold.fifo));
        let mut reader = reader(&path);
        let mut text = [0; 10];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"last words");
        assert!(is_done(&hold.fifo));
        drop(hold);
        assert_eq!(reader.read(&mut text).unwrap(), 0);
    }

    #[test]
    fn a_duplicate_of_our_own_end_is_no_reader_of_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let held = open_fifo(&path, (0, 0)).unwrap();
        let kept = held.try_clone().unwrap();
        nix::unistd::write(&held, b"last words").unwrap();
        let hold = last_words(held);
        drop(kept);
        let mut text = [0; 10];
        reader(&path).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"last words");
        assert!(is_done(&hold.expect("nobody has read").fifo));
    }

    #[test]
    fn nothing_said_or_all_of_it_read_is_no_reason_to_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        assert!(last_words(open_fifo(&path, (0, 0)).unwrap()).is_none());
        let held = open_fifo(&path, (0, 0)).unwrap();
        let mut reader = reader(&path);
        nix::unistd::write(&held, b"x").unwrap();
        reader.read_exact(&mut [0]).unwrap();
        assert!(last_words(held).is_none());
    }

    #[test]
    fn a_writer_of_a_two_way_pipe_outlives_its_reader() {
        let (read, write) = two_way_pipe((0, 0)).unwrap();
        drop(read);
        let mut write = File::from(write);
        write.write_all(b"nobody reads").unwrap();
        drop(write);
        let (read, write) = two_way_pipe((0, 0)).unwrap();
        assert!(!has_ended(&read));
        drop(write);
        assert!(has_ended(&read));
    }

    #[test]
    fn only_a_fifo_is_a_fifo() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open_fifo(dir.path().join("none"), (0, 0)).is_err());
        assert!(open_fifo(dir.path(), (0, 0)).is_err());
        assert!(open_fifo("/dev/null", (0, 0)).is_err());
    }
}
