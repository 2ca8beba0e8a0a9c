//! Bytes in and out: the listener, its connections, and containerd's event service.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    sys::{
        epoll::{EpollEvent, EpollFlags},
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
        },
    },
    unistd::geteuid,
};

use super::{ACCEPT_PAUSE_MS, CONNECTION, EVENT_ROOM, EVENTS, READ, READS, Shim, now};
use crate::{events::Post, log::Level, state::Input};

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
            self.handle(Input::Accepted);
            let number = self.state.connections.last();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, number | CONNECTION);
            match self.epoll.add(&stream, event) {
                Ok(()) => {
                    let fresh = self.supervised.keep("connection", stream.as_fd());
                    let socket = Socket {
                        stream,
                        waits: false,
                    };
                    self.sockets.insert(number, socket);
                    if fresh {
                        self.keep_all();
                    }
                }
                Err(_) => self.handle(Input::Closed(number)),
            }
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
            self.supervised.keep("listener", listener.as_fd());
        }
        for socket in self.sockets.values() {
            self.supervised.keep("connection", socket.stream.as_fd());
        }
    }

    pub(super) fn connection_ready(&mut self, number: u64, events: EpollFlags) {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush();
        }
        for _ in 0..READS {
            let mut buffer = [0; READ];
            let Some(socket) = self.sockets.get_mut(&number) else {
                return;
            };
            match socket.stream.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                    self.handle(Input::Bytes(number, bytes));
                    if count < READ {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return self.handle(Input::Closed(number)),
            }
        }
    }

    /// Writes what is unsent, as far as the peers take it.
    pub(super) fn flush(&mut self) {
        for number in self.state.connections.numbers() {
            let unsent = self.state.connections.unsent(number);
            let Some(socket) = self.sockets.get_mut(&number) else {
                continue;
            };
            if unsent.is_empty() && !socket.waits {
                continue;
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
                let mut flags = EpollFlags::EPOLLIN;
                flags.set(EpollFlags::EPOLLOUT, waits);
                let mut event = EpollEvent::new(flags, number | CONNECTION);
                broken |= self.epoll.modify(&socket.stream, &mut event).is_err();
            }
            let now = now();
            let input = if broken {
                Input::Closed(number)
            } else {
                Input::Sent(number, sent)
            };
            for output in self.step(input, now) {
                self.perform(output, now);
            }
        }
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
