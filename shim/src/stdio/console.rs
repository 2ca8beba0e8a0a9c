//! The socket on which the runtime sends a terminal's master.

use std::{
    io::{self, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollEvent, EpollFlags},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
    },
};

use serde::{Deserialize, Serialize};

use crate::{carry, sys};

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Console {
    Listening(#[serde(with = "carry::fd")] UnixListener),
    Connected(#[serde(with = "carry::fd")] UnixStream),
}

pub(super) enum Progress {
    Waits(Console),
    Got(OwnedFd),
}

impl Console {
    pub(super) fn watch(&self, number: u64, epoll: &Epoll) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number);
        match self {
            Console::Listening(listener) => epoll.add(listener, event)?,
            Console::Connected(stream) => epoll.add(stream, event)?,
        }
        Ok(())
    }

    pub(super) fn advance(self, number: u64, epoll: &Epoll) -> io::Result<Progress> {
        let stream = match self {
            Console::Listening(listener) => match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    epoll.delete(&listener)?;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
                    stream
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Waits(Console::Listening(listener)));
                }
                Err(e) => return Err(e),
            },
            Console::Connected(stream) => stream,
        };
        match receive_descriptor(stream.as_fd()) {
            Ok(Some(master)) => {
                epoll.delete(&stream)?;
                Ok(Progress::Got(master))
            }
            Ok(None) => Err(io::Error::other("no descriptor came")),
            Err(Errno::EAGAIN) => Ok(Progress::Waits(Console::Connected(stream))),
            Err(e) => Err(e.into()),
        }
    }
}

fn receive_descriptor(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    // The message is the terminal's name; nobody needs it.
    let mut name = [0; 256];
    let mut slices = [IoSliceMut::new(&mut name)];
    let mut space = cmsg_space!([std::os::fd::RawFd; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut found = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            found.extend(fds.into_iter().map(sys::received));
        }
    }
    // A second one, which no runtime sends, is closed.
    Ok(found.into_iter().next())
}
