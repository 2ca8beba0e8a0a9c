//! Descriptors of a predecessor that somebody else has kept while it died: see
//! `recoverd_common::handoff`. Each is looked at; what it is called counts for nothing, but for a
//! pidfd.

use std::{
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            Backlog, MsgFlags, getsockopt, listen, recv,
            sockopt::{AcceptConn, PeerCredentials},
        },
        stat::{SFlag, fstat},
    },
    unistd::geteuid,
};
use recoverd_common::{
    handoff,
    ttrpc::{HEADER, Header},
};

use super::Loot;
use crate::{sys, tasks::Process};

/// A shim takes what it has looked at before it looks at more, bytes.
const LOOKED_AT: usize = 96 << 10;

/// What was kept, by what it is.
#[derive(Debug, Default)]
pub struct Kept {
    /// Accepts at the place of the shim.
    pub listener: Option<UnixListener>,
    /// Accepted there.
    pub connections: Vec<UnixStream>,
    /// Terminals, pipes, fifos.
    pub loot: Loot,
    /// Processes of the shim, as its keeper took hold of them: of one that has been collected
    /// since, nobody else can say how it ended.
    pub pidfds: Vec<(Process, OwnedFd)>,
}

/// Takes over the `count` descriptors from `first` on that this process was started with. To be
/// called before anything else is opened.
pub fn inherited(first: RawFd, count: usize) -> Result<Vec<OwnedFd>, String> {
    (first..)
        .take(count)
        .map(|number| sys::inherited(number).ok_or(format!("descriptor {number} is not open")))
        .collect()
}

impl Kept {
    /// Sorts descriptors of the shim at `place`; those that are of no use are closed.
    pub fn sort(descriptors: Vec<OwnedFd>, names: &[String], place: &Path) -> Self {
        let mut kept = Self::default();
        for (fd, name) in descriptors.into_iter().zip(names) {
            if let Some(process) = handoff::pidfd_of(name) {
                kept.pidfds.push((super::process(process), fd));
                continue;
            }
            let kind = fstat(&fd).map_or(SFlag::empty(), |stat| {
                SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
            });
            if kind != SFlag::S_IFSOCK {
                kept.loot.add(fd);
            } else if getsockopt(&fd, AcceptConn).unwrap_or(false) {
                let listener = UnixListener::from(fd);
                if is_of(listener.local_addr(), place) && renew(&listener) {
                    kept.listener = Some(listener);
                }
            } else {
                let stream = UnixStream::from(fd);
                let peer = getsockopt(&stream, PeerCredentials);
                if is_of(stream.local_addr(), place)
                    && peer.is_ok_and(|peer| peer.uid() == geteuid().as_raw())
                    && stream.set_nonblocking(true).is_ok()
                {
                    kept.connections.push(stream);
                }
            }
        }
        kept
    }
}

fn is_of(address: std::io::Result<std::os::unix::net::SocketAddr>, place: &Path) -> bool {
    address.is_ok_and(|address| address.as_pathname() == Some(place))
}

/// From now on, who connects sees us and no longer the dead one. False if it has lost its name:
/// nobody could connect.
fn renew(listener: &UnixListener) -> bool {
    let place = listener.local_addr();
    let there = place.is_ok_and(|place| place.as_pathname().is_some_and(Path::exists));
    there && Backlog::new(128).is_ok_and(|backlog| listen(listener, backlog).is_ok())
}

/// The streams of the whole requests that are still in a socket.
pub fn streams_within(connection: &UnixStream) -> Vec<u32> {
    let mut bytes = vec![0; LOOKED_AT];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let count = loop {
        match recv(connection.as_raw_fd(), &mut bytes, flags) {
            Ok(count) => break count,
            Err(Errno::EINTR) => {}
            Err(_) => break 0,
        }
    };
    let mut rest = bytes.get(..count).unwrap_or_default();
    let mut streams = Vec::new();
    while let Some(header) = Header::parse(rest) {
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let Some(next) = rest.get(HEADER.saturating_add(length)..) else {
            break;
        };
        streams.push(header.stream);
        rest = next;
    }
    streams
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::fd::AsFd};

    #[test]
    fn every_descriptor_is_known_by_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("socket");
        let listener = UnixListener::bind(&place).unwrap();
        let _client = UnixStream::connect(&place).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let elsewhere = dir.path().join("other");
        let other = UnixListener::bind(&elsewhere).unwrap();
        let _stranger = UnixStream::connect(&elsewhere).unwrap();
        let (foreign, _) = other.accept().unwrap();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let meta = fstat(&pipe).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let inode = fstat(accepted.as_fd()).unwrap().st_ino;
        let all: Vec<OwnedFd> = vec![
            file.into(),
            foreign.into(),
            other.into(),
            pipe,
            accepted.into(),
            listener.try_clone().unwrap().into(),
        ];
        let names = vec!["whatever".to_owned(); all.len()];
        let kept = Kept::sort(all, &names, &place);
        assert!(kept.listener.is_some());
        let inodes = kept.connections.iter().map(|c| fstat(c).unwrap().st_ino);
        assert_eq!(inodes.collect::<Vec<_>>(), [inode]);
        assert!(kept.loot.has_pipe((meta.st_dev, meta.st_ino)));
        // Nobody would find it there.
        std::fs::remove_file(&place).unwrap();
        let kept = Kept::sort(vec![listener.into()], &names, &place);
        assert!(kept.listener.is_none());
    }

    #[test]
    fn whole_requests_in_a_socket_are_seen_and_stay_there() {
        let (mut client, server) = UnixStream::pair().unwrap();
        assert_eq!(streams_within(&server), [0; 0]);
        let frame = |stream, length: u32| {
            let header = Header {
                length,
                stream,
                kind: recoverd_common::ttrpc::Kind::Request,
                flags: 0,
            };
            let payload = vec![0; usize::try_from(length).unwrap()];
            [&header.bytes()[..], &payload].concat()
        };
        client.write_all(&frame(5, 30_000)).unwrap();
        client.write_all(&frame(7, 0)).unwrap();
        client.write_all(&frame(9, 100)[..50]).unwrap();
        for _ in 0..2 {
            assert_eq!(streams_within(&server), [5, 7]);
        }
    }
}
