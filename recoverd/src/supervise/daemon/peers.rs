//! Who has connected, what they say, and what they are answered.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{EpollEvent, EpollFlags},
    socket::{SockFlag, accept4},
};
use recoverd_common::{
    failpoint,
    seen::Seen,
    supervision::{Answer, Link, MAX_FILES, Named, Packet, Word},
    sys,
};

use super::{
    super::{bag::Kept, decide::Input},
    Daemon, PEER,
};

/// Somebody who has connected.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) link: Link,
    /// A shim that has said who it is.
    pub(super) socket: Option<PathBuf>,
}

impl Daemon {
    pub(super) fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while let Ok(number) = accept4(self.listener.as_raw_fd(), flags) {
            let Some(fd) = sys::received(&[number]).pop() else {
                return;
            };
            let link = match Link::of(fd) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%error, "refuse a connection");
                    continue;
                }
            };
            self.last = self.last.saturating_add(1);
            let token = self.last | PEER;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            if self.epoll.add(&link, event).is_ok() {
                self.peers.insert(token, Peer { link, socket: None });
                failpoint!("supervise.accept.after");
            }
        }
    }

    /// Takes everything that a peer has said.
    pub(super) fn hear(&mut self, token: u64) {
        loop {
            let Some(peer) = self.peers.get(&token) else {
                return;
            };
            let went = match peer.link.receive() {
                Ok(Some(packet)) => self.word(token, packet),
                Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => Err(error),
            };
            if let Err(error) = went {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!(%error, "close a connection");
                }
                if let Some(peer) = self.peers.remove(&token) {
                    let _ = self.epoll.delete(&peer.link);
                    // A shim that lives on has lost us, and may have told in vain.
                    let soon = Instant::now() + Duration::from_secs(1);
                    self.missed.extend(peer.socket.map(|socket| (socket, soon)));
                }
                return;
            }
        }
    }

    pub(super) fn word(&mut self, token: u64, packet: Packet) -> io::Result<()> {
        let Some(peer) = self.peers.get_mut(&token) else {
            return Ok(());
        };
        let word: Word = serde_json::from_slice(&packet.bytes).map_err(io::Error::other)?;
        let nameless = || io::Error::other("it has not said who it is");
        match word {
            Word::Shim {
                socket,
                process: Named(process),
            } => {
                let pid = peer.link.peer()?;
                let is_it = match self.proc.stat(pid) {
                    Seen::Present(stat) => stat.id.start_time == process.start_time,
                    // It has died since: what it says is what it had.
                    Seen::Absent => true,
                    Seen::Unknown(_) => false,
                };
                if !is_it || u32::try_from(pid) != Ok(process.pid) || !socket.is_absolute() {
                    return Err(io::Error::other("it is not whom it says"));
                }
                peer.socket = Some(socket.clone());
                self.changed.entry(socket).or_insert_with(Instant::now);
            }
            Word::Keep { name } => {
                let socket = peer.socket.clone().ok_or_else(nameless)?;
                for fd in packet.files.into_iter().take(1) {
                    self.keep(&socket, &name, fd);
                }
            }
            Word::Drop { names, number } => {
                let socket = peer.socket.clone().ok_or_else(nameless)?;
                let given = self.bag.give_up(&socket, |kept| names.contains(&kept.name));
                self.given_up(&socket, given);
                self.answer(token, &Answer::Dropped { number }, &[]);
            }
            Word::Fetch { socket } => self.fetch(token, &socket),
            Word::Leave {
                socket,
                process: Named(process),
            } => {
                failpoint!("supervise.leave.before");
                self.inbox.push(Input::Leave(socket, process));
                self.settle();
                failpoint!("supervise.leave.after");
                self.answer(token, &Answer::Noted, &[]);
            }
            Word::How {
                process: Named(process),
            } => {
                let answer = self.how_ended(process);
                self.answer(token, &answer, &[]);
            }
        }
        Ok(())
    }

    /// Whoever does not take an answer at once does without.
    pub(super) fn answer(&self, token: u64, answer: &Answer, files: &[&Kept]) {
        failpoint!("supervise.answer.before");
        let files: Vec<_> = files.iter().map(|kept| kept.fd.as_fd()).collect();
        if let Some(peer) = self.peers.get(&token)
            && let Err(error) = peer.link.send(answer, &files)
        {
            tracing::info!(%error, "answer");
        }
        failpoint!("supervise.answer.after");
    }

    pub(super) fn fetch(&mut self, token: u64, socket: &Path) {
        failpoint!("supervise.fetch.before");
        let all: Vec<&Kept> = self.bag.of(socket).iter().collect();
        let mut packets = all.chunks(MAX_FILES).peekable();
        if packets.peek().is_none() {
            let names = Vec::new();
            self.answer(token, &Answer::Kept { names, more: false }, &[]);
        }
        while let Some(files) = packets.next() {
            let names = files.iter().map(|kept| kept.name.clone()).collect();
            let more = packets.peek().is_some();
            self.answer(token, &Answer::Kept { names, more }, files);
        }
        failpoint!("supervise.fetch.after");
    }
}
