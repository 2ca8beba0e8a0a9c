//! One direction of copying, by splice(2) where the kernel can.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollEvent, EpollFlags},
        stat::fstat,
    },
};

use serde::{Deserialize, Serialize};

use super::pipes::is_pipe;
use crate::{carry, service::Key};

/// One splice, bytes.
const CHUNK: usize = 1 << 20;
/// So many splices, then others have their turn.
const TURN: u32 = 16;

/// One direction of copying.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Relay {
    /// Whose.
    pub(super) key: Key,
    /// None, of an output: the terminal's master, which its process holds, once for both ways.
    #[serde(with = "carry::maybe_fd")]
    pub(super) from: Option<OwnedFd>,
    /// None: an output goes nowhere, an input to the terminal's master.
    #[serde(with = "carry::maybe_fd")]
    pub(super) to: Option<OwnedFd>,
    pub(super) kind: RelayKind,
    /// Read and not yet written, where splice(2) does not go.
    pub(super) pending: Vec<u8>,
    /// Which end epoll watches, if any.
    pub(super) watched: Option<End>,
    /// The master once more, while it is waited for to take something: by its own number it is
    /// watched already, for what it gives.
    #[serde(skip)]
    pub(super) room: Option<OwnedFd>,
    /// Why its file did not take something, the first time that it did not.
    #[serde(skip)]
    pub(super) refused: Option<Errno>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum RelayKind {
    Output,
    /// `true`: ends when the client's fifo is empty.
    Input(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    From,
    To,
}

/// How a turn of copying ended.
pub(super) enum Turn {
    Over,
    Wait(End),
    Again,
}

impl Relay {
    fn from<'a>(&'a self, master: Option<&'a OwnedFd>) -> Option<&'a OwnedFd> {
        self.from.as_ref().or(master)
    }

    fn to<'a>(&'a self, master: Option<&'a OwnedFd>) -> Option<&'a OwnedFd> {
        match self.kind {
            RelayKind::Output => self.to.as_ref(),
            RelayKind::Input(_) => self.to.as_ref().or(master),
        }
    }

    pub(super) fn watch(
        &mut self,
        end: Option<End>,
        number: u64,
        epoll: &Epoll,
        master: Option<&OwnedFd>,
    ) -> io::Result<()> {
        if self.watched == end {
            return Ok(());
        }
        // One end at a time: an end that is not watched at all cannot report its hang-up again
        // and again.
        match self.watched.take() {
            Some(End::From) => {
                if let Some(from) = self.from(master) {
                    epoll.delete(from)?;
                }
            }
            Some(End::To) => {
                if let Some(to) = self.room.as_ref().or(self.to.as_ref()) {
                    epoll.delete(to)?;
                }
                self.room = None;
            }
            None => {}
        }
        match end {
            Some(End::From) => {
                let from = self.from(master);
                let from = from.ok_or_else(|| io::Error::other("the terminal is gone"))?;
                epoll.add(from, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
            }
            Some(End::To) => {
                if self.to.is_none()
                    && let Some(master) = self.to(master)
                {
                    self.room = Some(master.try_clone()?);
                }
                if let Some(to) = self.room.as_ref().or(self.to.as_ref()) {
                    epoll.add(to, EpollEvent::new(EpollFlags::EPOLLOUT, number))?;
                }
            }
            None => {}
        }
        self.watched = end;
        Ok(())
    }

    /// From which pipe to which it goes, by their inodes; none if it is something else.
    pub(super) fn carries(&self) -> Option<(u64, u64)> {
        let to = self
            .to
            .as_ref()
            .filter(|_| self.kind == RelayKind::Output)?;
        let inode = |fd| Some(fstat(fd).ok().filter(|_| is_pipe(fd))?.st_ino);
        Some((inode(self.from.as_ref()?)?, inode(to)?))
    }

    /// `master` is that of the process's terminal, if it has one.
    pub(super) fn turn(&mut self, master: Option<&OwnedFd>) -> Turn {
        for _ in 0..TURN {
            match self.carry(master) {
                Ok(0) => return Turn::Over,
                Ok(_) => {}
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return self.blocked(master),
                // EIO: the terminal's last slave is closed. EPIPE: nobody reads any more.
                Err(_) => return Turn::Over,
            }
        }
        Turn::Again
    }

    fn carry(&mut self, master: Option<&OwnedFd>) -> Result<usize, Errno> {
        self.write_pending(master)?;
        let mut buffer = [0; 4096];
        let from = self.from(master).ok_or(Errno::EIO)?;
        let Some(to) = self.to(master) else {
            return match self.kind {
                RelayKind::Output => nix::unistd::read(from, &mut buffer),
                RelayKind::Input(_) => Err(Errno::EIO),
            };
        };
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        match splice(from, None, to, None, CHUNK, flags) {
            // Neither end is a pipe (a terminal to a file), or a kernel that does not splice
            // terminals.
            Err(Errno::EINVAL) => {
                let count = nix::unistd::read(from, &mut buffer)?;
                // What cannot be written now must not be lost; what can be is, as nothing wakes us
                // for it once all is read.
                let read = buffer.get(..count).unwrap_or_default();
                self.pending.extend_from_slice(read);
                self.write_pending(master)?;
                Ok(count)
            }
            other => other,
        }
    }

    /// A file that does not take it (its disk is full) costs what was to be written, and not the
    /// writer: nobody else would read what it writes next.
    fn write_pending(&mut self, master: Option<&OwnedFd>) -> Result<(), Errno> {
        while !self.pending.is_empty() {
            let Some(to) = self.to(master) else {
                return Ok(());
            };
            match nix::unistd::write(to, &self.pending) {
                Ok(written) => {
                    self.pending.drain(..written.min(self.pending.len()));
                }
                Err(wait @ (Errno::EAGAIN | Errno::EINTR)) => return Err(wait),
                Err(why) if self.kind == RelayKind::Output && !is_pipe(to) => {
                    self.pending.clear();
                    self.refused.get_or_insert(why);
                }
                Err(why) => return Err(why),
            }
        }
        Ok(())
    }

    /// Which end waits?
    fn blocked(&self, master: Option<&OwnedFd>) -> Turn {
        if !self.pending.is_empty() {
            return Turn::Wait(End::To);
        }
        let Some(from) = self.from(master) else {
            return Turn::Over;
        };
        let mut wait = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut wait, PollTimeout::ZERO);
        let [entry] = &wait;
        let seen = entry.revents().unwrap_or(PollFlags::empty());
        if seen.contains(PollFlags::POLLIN) {
            // With room there, something was written since the read. A file and nowhere are never
            // full; a file cannot even be watched.
            return match self.has_room(master) {
                true => Turn::Again,
                false => Turn::Wait(End::To),
            };
        }
        if self.kind == RelayKind::Input(true) || seen.contains(PollFlags::POLLHUP) {
            return Turn::Over;
        }
        Turn::Wait(End::From)
    }

    fn has_room(&self, master: Option<&OwnedFd>) -> bool {
        let Some(to) = self.to(master) else {
            return true;
        };
        let mut wait = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
        let _ = poll(&mut wait, PollTimeout::ZERO);
        let [entry] = &wait;
        entry.any().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{fcntl::OFlag, unistd::pipe2};

    fn relay(from: OwnedFd, to: OwnedFd, kind: RelayKind) -> Relay {
        Relay {
            key: Key::init("c"),
            from: Some(from),
            to: Some(to),
            kind,
            pending: Vec::new(),
            watched: None,
            room: None,
            refused: None,
        }
    }

    fn append(path: &std::path::Path) -> OwnedFd {
        let mut options = std::fs::File::options();
        options.append(true).create(true).open(path).unwrap().into()
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap()
    }

    #[test]
    fn a_full_pipe_makes_the_writer_wait_and_loses_nothing() {
        let (from, source) = pipe();
        let (sink, to) = pipe();
        let mut relay = relay(from, to, RelayKind::Output);
        let mut sent = Vec::new();
        let mut got = Vec::new();
        let mut buffer = [0; 3000];
        for round in 0..2000u32 {
            let bytes = [round.to_le_bytes()[0]; 1000];
            if nix::unistd::write(&source, &bytes).is_ok() {
                sent.extend_from_slice(&bytes);
            }
            assert!(matches!(relay.turn(None), Turn::Wait(_)));
            if round % 3 == 0
                && let Ok(count) = nix::unistd::read(&sink, &mut buffer)
            {
                got.extend_from_slice(&buffer[..count]);
            }
        }
        drop(source);
        while !matches!(relay.turn(None), Turn::Over) {
            let count = nix::unistd::read(&sink, &mut buffer).unwrap();
            got.extend_from_slice(&buffer[..count]);
        }
        drop(relay);
        while let Ok(count) = nix::unistd::read(&sink, &mut buffer) {
            if count == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..count]);
        }
        assert!(sent.len() > 500_000 && sent == got);
    }

    #[test]
    fn what_goes_nowhere_never_waits_for_room() {
        let (from, source) = pipe();
        let mut relay = relay(from, pipe().1, RelayKind::Output);
        relay.to = None;
        assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
        // Written between the read that found nothing and the look at why.
        nix::unistd::write(&source, b"late").unwrap();
        assert!(matches!(relay.blocked(None), Turn::Again));
        drop(source);
        assert!(matches!(relay.turn(None), Turn::Over));
    }

    #[test]
    fn a_file_is_never_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let (from, source) = pipe();
        let mut relay = relay(from, append(&out), RelayKind::Output);
        assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
        // Written between the read that found nothing and the look at why.
        nix::unistd::write(&source, b"late").unwrap();
        assert!(matches!(relay.blocked(None), Turn::Again));
        assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
        assert_eq!(std::fs::read(&out).unwrap(), b"late");
    }

    #[test]
    fn a_full_disk_costs_what_is_written_and_not_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let (from, source) = pipe();
        let mut relay = relay(from, append("/dev/full".as_ref()), RelayKind::Output);
        for _ in 0..2 {
            nix::unistd::write(&source, b"lost").unwrap();
            assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
            assert_eq!(relay.refused, Some(Errno::ENOSPC));
            assert_eq!(crate::sys::waiting_bytes(source.as_fd()).unwrap(), 0);
        }
        // There is room again.
        let out = dir.path().join("out");
        relay.to = Some(append(&out));
        nix::unistd::write(&source, b"kept").unwrap();
        assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
        assert_eq!(std::fs::read(&out).unwrap(), b"kept");
        drop(source);
        assert!(matches!(relay.turn(None), Turn::Over));
    }

    #[test]
    fn what_a_turn_has_read_it_has_written() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let (from, source) = pipe();
        let mut relay = relay(from, append(&out), RelayKind::Output);
        // All that a turn can copy, and nothing more: nothing would begin another one.
        let sent = vec![b'x'; 16 * 4096];
        assert_eq!(nix::unistd::write(&source, &sent), Ok(sent.len()));
        assert!(matches!(relay.turn(None), Turn::Again));
        assert_eq!(std::fs::read(&out).unwrap().len(), sent.len());
    }

    #[test]
    fn stdin_ends_when_asked_to_and_not_before_what_was_written_is_carried() {
        let (from, client) = pipe();
        let (sink, to) = pipe();
        let mut relay = relay(from, to, RelayKind::Input(false));
        nix::unistd::write(&client, b"all of it").unwrap();
        assert!(matches!(relay.turn(None), Turn::Wait(End::From)));
        nix::unistd::write(&client, b", really").unwrap();
        relay.kind = RelayKind::Input(true);
        // The client still holds its end.
        assert!(matches!(relay.turn(None), Turn::Over));
        let mut buffer = [0; 100];
        let count = nix::unistd::read(&sink, &mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"all of it, really");
    }

    #[test]
    fn where_splice_does_not_go_the_bytes_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        std::fs::write(&path, vec![b'x'; 10_000]).unwrap();
        let open = |path: &std::path::Path, write: bool| -> OwnedFd {
            let mut options = std::fs::File::options();
            let options = options.read(!write).write(write).create(write);
            options.open(path).unwrap().into()
        };
        let out = dir.path().join("out");
        let mut relay = relay(open(&path, false), open(&out, true), RelayKind::Output);
        assert!(matches!(relay.turn(None), Turn::Over));
        assert_eq!(std::fs::read(&out).unwrap().len(), 10_000);
    }
}
