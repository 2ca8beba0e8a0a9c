//! Bytes in and out: the listener, its connections, and containerd's event service.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{EpollEvent, EpollFlags},
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv,
            socket, sockopt,
        },
        stat::fstat,
    },
    unistd::geteuid,
};
use recoverd_common::handoff;

use super::{ACCEPT_PAUSE_MS, CONNECTION, EVENT_ROOM, EVENTS, READ, READS, Shim, now};
use crate::{connections::Arrived, events::Post, log::Level, state::Input};

/// What there is to read.
enum Looked {
    /// This, and it is to be taken; `true`: it may not be all.
    Here(Vec<u8>, bool),
    /// Not yet enough.
    Nothing,
    /// The peer has gone.
    Ended,
}

/// What epoll tells of a connection, once each time that something comes: what is half here stays
/// in the socket, and would be told for ever.
fn watched(waits: bool) -> EpollFlags {
    let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    flags.set(EpollFlags::EPOLLOUT, waits);
    flags
}

/// One connection's socket.
pub(super) struct Socket {
    pub(super) stream: UnixStream,
    /// Epoll watches it for room to write.
    waits: bool,
}

impl Shim {
    pub(super) fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    // Out of descriptors or memory: the backlog would wake us again at once.
                    self.log.say(Level::Warning, &format!("accept: {e}"));
                    let _ = self.epoll.delete(listener);
                    self.accept_at = Some(now().mono_ms.saturating_add(ACCEPT_PAUSE_MS));
                    return;
                }
            };
            let peer = getsockopt(&stream, sockopt::PeerCredentials);
            if !peer.is_ok_and(|peer| peer.uid() == geteuid().as_raw()) {
                self.log
                    .say(Level::Warning, "refuse a connection of another user");
                continue;
            }
            if let Err(e) = stream.set_nonblocking(true) {
                self.log.say(Level::Warning, &format!("accept: {e}"));
                continue;
            }
            if let Some(number) = self.connected(stream) {
                self.keep_connection(number);
                self.handle(Input::Accepted(number));
            }
        }
    }

    /// Takes a connection; gives its number, which is the same for whoever has it after us.
    pub(super) fn connected(&mut self, stream: UnixStream) -> Option<u64> {
        let watched = fstat(&stream).and_then(|stat| {
            let number = stat.st_ino;
            let event = EpollEvent::new(watched(false), number | CONNECTION);
            self.epoll.add(&stream, event).map(|()| number)
        });
        match watched {
            Ok(number) => {
                let socket = Socket {
                    stream,
                    waits: false,
                };
                self.sockets.insert(number, socket);
                Some(number)
            }
            Err(e) => {
                self.log.say(Level::Warning, &format!("accept: {e}"));
                None
            }
        }
    }

    /// Gives it to the supervisor, before its first answer.
    fn keep_connection(&mut self, number: u64) {
        let Some(socket) = self.sockets.get(&number) else {
            return;
        };
        if self
            .supervised
            .keep(handoff::CONNECTION, socket.stream.as_fd())
        {
            self.keep_all();
        }
    }

    /// Tells the supervisor of what was opened and closed since the last answer.
    pub(super) fn tell_supervisor(&mut self) {
        let tell = self.stdio.take_tell();
        if !tell.is_empty() && self.supervised.tell(tell) {
            self.keep_all();
        }
    }

    /// Tells the supervisor of everything that it does not find by looking into us, as fast as
    /// we may die.
    fn keep_all(&mut self) {
        if let Some(listener) = &self.listener {
            self.supervised.keep(handoff::LISTENER, listener.as_fd());
        }
        for socket in self.sockets.values() {
            self.supervised
                .keep(handoff::CONNECTION, socket.stream.as_fd());
        }
    }

    pub(super) fn connection_ready(&mut self, number: u64, events: EpollFlags) {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush();
        }
        let ends = events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP);
        for _ in 0..READS {
            match self.look(number) {
                Looked::Here(bytes, more) => {
                    self.handle(Input::Bytes(number, bytes));
                    if !more && !ends {
                        return;
                    }
                }
                Looked::Nothing if ends => return self.handle(Input::Closed(number)),
                Looked::Nothing => return,
                Looked::Ended => return self.handle(Input::Closed(number)),
            }
        }
        // Others have their turn; epoll tells anew what it is asked for anew.
        if let Some(socket) = self.sockets.get(&number) {
            let mut event = EpollEvent::new(watched(socket.waits), number | CONNECTION);
            let _ = self.epoll.modify(&socket.stream, &mut event);
        }
    }

    /// Looks at what has come in, and leaves it there.
    fn look(&self, number: u64) -> Looked {
        let Some(socket) = self.sockets.get(&number) else {
            return Looked::Nothing;
        };
        let fd = socket.stream.as_raw_fd();
        let mut bytes = vec![0; READ];
        loop {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let count = match recv(fd, &mut bytes, flags) {
                Ok(count) if count > 0 => count,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Looked::Nothing,
                Ok(_) | Err(_) => return Looked::Ended,
            };
            let seen = bytes.get(..count).unwrap_or_default();
            match self.state.connections.look(number, seen) {
                Arrived::Take(whole) => {
                    let more = whole < count || count == bytes.len();
                    bytes.truncate(whole);
                    return Looked::Here(bytes, more);
                }
                Arrived::Wait(wanted) if wanted > bytes.len() => bytes.resize(wanted, 0),
                Arrived::Wait(_) => return Looked::Nothing,
            }
        }
    }

    /// Takes what was looked at: it is written down now.
    pub(super) fn consume(&self, number: u64, count: usize) {
        let Some(socket) = self.sockets.get(&number) else {
            return;
        };
        let mut buffer = [0; READ];
        let mut left = count;
        while left > 0 {
            let Some(piece) = buffer.get_mut(..left.min(READ)) else {
                return;
            };
            match (&socket.stream).read(piece) {
                Ok(0) => return,
                Ok(count) => left = left.saturating_sub(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // It was there a moment ago, and nobody else reads: the next look tells.
                Err(_) => return,
            }
        }
    }

    /// Writes what is unsent, as far as the peers take it.
    pub(super) fn flush(&mut self) {
        for number in self.state.connections.numbers() {
            while self.flush_some(number) {}
        }
    }

    /// True if there may be more.
    fn flush_some(&mut self, number: u64) -> bool {
        let unsent = self.state.connections.unsent(number);
        let Some(socket) = self.sockets.get_mut(&number) else {
            return false;
        };
        if unsent.is_empty() && !socket.waits {
            return false;
        }
        let total = unsent.len();
        let mut sent = 0;
        let mut broken = false;
        while let Some(rest) = unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            match socket.stream.write(rest) {
                Ok(count) => sent += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        let waits = sent < total && !broken;
        if waits != socket.waits {
            socket.waits = waits;
            let mut event = EpollEvent::new(watched(waits), number | CONNECTION);
            broken |= self.epoll.modify(&socket.stream, &mut event).is_err();
        }
        let now = now();
        let input = if broken {
            Input::Closed(number)
        } else {
            Input::Sent(number, sent)
        };
        let outputs = self.step(input, now);
        self.note(&outputs);
        for output in outputs {
            self.perform(output, now);
        }
        sent > 0 && !waits && !broken
    }

    // ---- containerd's event service ----

    pub(super) fn post(&mut self, post: Post) {
        if self.retired
            && matches!(post, Post::Open | Post::Send(_))
            && !self.event_log.is_in_place()
        {
            // A new shim of the group has them and sends them: nothing is left for us.
            self.leave = true;
            return;
        }
        match post {
            Post::Open => {
                // What came before that was heard asks for it as well. A second one would begin to
                // count anew, and containerd refuse what it is told under a number that it has had.
                if self.inbox.contains(&Input::EventsOpened) {
                    return;
                }
                let input = match self.connect_events() {
                    Ok(stream) => {
                        self.events = Some(stream);
                        self.events_unsent = Vec::new();
                        Input::EventsOpened
                    }
                    Err(e) => {
                        Input::EventsLost(format!("connect {}: {e}", self.events_address.display()))
                    }
                };
                self.inbox.push_back(input);
            }
            Post::Send(bytes) => {
                self.events_unsent = bytes;
                self.send_events();
            }
            Post::Close => self.events = None,
            Post::Acknowledged(number) => {
                let mut result = self.event_log.acknowledge(number);
                // What is being made was promised more than what is there is owed.
                if result.is_ok() && self.state.tasks.jobs().is_empty() {
                    let keep = self.owed_events().saturating_add(EVENT_ROOM);
                    result = self.event_log.shrink(keep);
                }
                if let Err(e) = result {
                    self.log.say(Level::Error, &format!("write events: {e}"));
                }
            }
            Post::Say(text) => self.log.say(Level::Warning, &text),
        }
    }

    /// Writes what the event service takes; the rest when it takes more.
    pub(super) fn send_events(&mut self) {
        let Some(stream) = &mut self.events else {
            return;
        };
        let result = loop {
            if self.events_unsent.is_empty() {
                self.events_unsent = Vec::new();
                break Ok(EpollFlags::EPOLLIN);
            }
            match stream.write(&self.events_unsent) {
                Ok(count) => drop(self.events_unsent.drain(..count)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    break Ok(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT);
                }
                Err(e) => break Err(e),
            }
        };
        let watched = result.and_then(|flags| {
            let mut event = EpollEvent::new(flags, EVENTS);
            self.epoll.modify(&*stream, &mut event).map_err(Into::into)
        });
        if let Err(e) = watched {
            self.events = None;
            let why = format!("send event: {e}");
            self.inbox.push_back(Input::EventsLost(why));
        }
    }

    pub(super) fn connect_events(&self) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let address = UnixAddr::new(&self.events_address)?;
        connect(fd.as_raw_fd(), &address)?;
        let stream = UnixStream::from(fd);
        self.epoll
            .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, EVENTS))?;
        Ok(stream)
    }

    pub(super) fn events_ready(&mut self) {
        loop {
            let mut buffer = [0; 512];
            let Some(stream) = &mut self.events else {
                return;
            };
            match stream.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                    self.handle(Input::EventsBytes(bytes));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.events = None;
                    let why = "event service closed the connection".to_owned();
                    return self.handle(Input::EventsLost(why));
                }
            }
        }
    }
}
