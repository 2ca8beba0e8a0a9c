//! One direction of copying, by splice(2) where the kernel can.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollEvent, EpollFlags},
};

use crate::service::Key;

/// One splice, bytes.
const CHUNK: usize = 1 << 20;
/// So many splices, then others have their turn.
const TURN: u32 = 16;

/// One direction of copying.
#[derive(Debug)]
pub(super) struct Relay {
    /// Whose.
    pub(super) key: Key,
    pub(super) from: OwnedFd,
    /// None: to nowhere.
    pub(super) to: Option<OwnedFd>,
    pub(super) kind: RelayKind,
    /// Which end epoll watches, if any.
    pub(super) watched: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RelayKind {
    Output,
    /// `true`: ends when the client's fifo is empty.
    Input(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub(super) fn watch(&mut self, end: Option<End>, number: u64, epoll: &Epoll) -> io::Result<()> {
        if self.watched == end {
            return Ok(());
        }
        // One end at a time: an end that is not watched at all cannot report its hang-up again
        // and again.
        match self.watched {
            Some(End::From) => epoll.delete(&self.from)?,
            Some(End::To) => {
                if let Some(to) = &self.to {
                    epoll.delete(to)?;
                }
            }
            None => {}
        }
        self.watched = None;
        match end {
            Some(End::From) => {
                epoll.add(&self.from, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
            }
            Some(End::To) => {
                if let Some(to) = &self.to {
                    epoll.add(to, EpollEvent::new(EpollFlags::EPOLLOUT, number))?;
                }
            }
            None => {}
        }
        self.watched = end;
        Ok(())
    }

    pub(super) fn turn(&mut self) -> Turn {
        for _ in 0..TURN {
            match self.carry() {
                Ok(0) => return Turn::Over,
                Ok(_) => {}
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return self.blocked(),
                // EIO: the terminal's last slave is closed. EPIPE: nobody reads any more.
                Err(_) => return Turn::Over,
            }
        }
        Turn::Again
    }

    fn carry(&self) -> Result<usize, Errno> {
        let mut buffer = [0; 4096];
        let Some(to) = &self.to else {
            return nix::unistd::read(&self.from, &mut buffer);
        };
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        match splice(&self.from, None, to, None, CHUNK, flags) {
            // Neither end is a pipe (a terminal to a file).
            Err(Errno::EINVAL) => {
                let count = nix::unistd::read(&self.from, &mut buffer)?;
                let mut rest = buffer.get(..count).unwrap_or_default();
                while !rest.is_empty() {
                    let written = nix::unistd::write(to, rest)?;
                    rest = rest.get(written..).unwrap_or_default();
                }
                Ok(count)
            }
            other => other,
        }
    }

    /// Which end waits?
    fn blocked(&self) -> Turn {
        let mut wait = [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut wait, PollTimeout::ZERO);
        let [entry] = &wait;
        let seen = entry.revents().unwrap_or(PollFlags::empty());
        if seen.contains(PollFlags::POLLIN) {
            return Turn::Wait(End::To);
        }
        if self.kind == RelayKind::Input(true) || seen.contains(PollFlags::POLLHUP) {
            return Turn::Over;
        }
        Turn::Wait(End::From)
    }
}
