//! What shims and recoverd's commands say to `recoverd supervise`, on `<run-dir>/supervise.sock`:
//! packets (SOCK_SEQPACKET), each one JSON object, descriptors beside it. Root only: the folder is
//! 0700, the socket 0600, and each side looks at the other's uid.
//!
//! ```text
//! shim      Shim {socket, process}            first, once a connection
//!           Keep {name} + one descriptor      not answered, never waited for
//!           Drop {names, number}              answered: Dropped {number}, when it holds none of them
//! recoverd  Fetch {socket}                    answered: Kept {names, more} + descriptors, until no more
//!           Leave {socket, process}           answered: Noted; this shim's end will be meant
//! successor How {process}                     answered: Ended {status, soon}
//! ```
//!
//! A shim says what it has before others can rely on it: a connection before the first answer on
//! it. Nobody there, or nobody who listens: no difference, and what was missed is caught up by
//! looking into the shim (`pidfd_getfd`). Nothing here is ever waited for longer than [`PATIENCE`].

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
        connect, getsockopt, recvmsg, sendmsg, socket, sockopt,
    },
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};

use crate::{record::Process, sys};

/// recoverd's own runtime files, unless told otherwise. A shim looks nowhere else.
pub const RUN_DIR: &str = "/run/recoverd";
/// Longest packet, bytes: names of at most [`MAX_FILES`] descriptors, each two ids long.
pub const MAX_PACKET: usize = 32 << 10;
/// Descriptors in one packet.
pub const MAX_FILES: usize = 64;
/// What the kernel takes in one packet (SCM_MAX_FD): with room for all of them none is left in
/// the middle, taken in and unknown to us.
const KERNEL_MAX_FILES: usize = 253;
/// For an answer.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// Between two questions for the same end.
const ASKED_AGAIN: Duration = Duration::from_millis(20);

/// Where the supervisor listens.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("supervise.sock")
}

/// A process, on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64)", into = "(u32, u64)")]
pub struct Named(pub Process);

impl From<(u32, u64)> for Named {
    fn from((pid, start_time): (u32, u64)) -> Self {
        Self(Process { pid, start_time })
    }
}

impl From<Named> for (u32, u64) {
    fn from(Named(process): Named) -> Self {
        (process.pid, process.start_time)
    }
}

/// To the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum Word {
    /// I am the shim at this socket.
    Shim {
        /// Where it listens.
        socket: PathBuf,
        /// It; the kernel knows whether that is true.
        process: Named,
    },
    /// Keep the descriptor beside this.
    Keep {
        /// What it is; see `handoff`.
        name: String,
    },
    /// Keep these no longer.
    Drop {
        /// What they are.
        names: Vec<String>,
        /// Comes back with the answer.
        number: u64,
    },
    /// What is kept of the shim at this socket?
    Fetch {
        /// Where it listened.
        socket: PathBuf,
    },
    /// This shim is about to be ended, and is to have no successor.
    Leave {
        /// Where it listens.
        socket: PathBuf,
        /// It.
        process: Named,
    },
    /// How has this init or exec ended?
    How {
        /// It, which has.
        process: Named,
    },
}

/// From the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// To Drop.
    Dropped {
        /// Its number.
        number: u64,
    },
    /// To Fetch.
    Kept {
        /// Of the descriptors beside this, in order.
        names: Vec<String>,
        /// Another packet follows.
        more: bool,
    },
    /// To Leave.
    Noted,
    /// To How.
    Ended {
        /// Exit code, or 128 + signal; none when the kernel has not said.
        status: Option<u32>,
        /// It may say so yet: to be asked again.
        soon: bool,
    },
}

/// One side of a connection.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
}

/// What came in.
#[derive(Debug)]
pub struct Packet {
    /// The object.
    pub bytes: Vec<u8>,
    /// What came beside it.
    pub files: Vec<OwnedFd>,
}

impl Link {
    /// Connects to whoever listens at `path`. Never waits; an error means that there is no
    /// supervisor, for now.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::of(fd)
    }

    /// Takes an accepted connection; one of another user is refused.
    pub fn of(fd: OwnedFd) -> io::Result<Self> {
        let peer = getsockopt(&fd, sockopt::PeerCredentials)?;
        if peer.uid() != geteuid().as_raw() {
            return Err(io::Error::other(format!("peer has uid {}", peer.uid())));
        }
        Ok(Self { fd })
    }

    /// The pid that the peer had when it connected.
    pub fn peer(&self) -> io::Result<i32> {
        Ok(getsockopt(&self.fd, sockopt::PeerCredentials)?.pid())
    }

    /// Sends one packet, if there is room for it at once.
    pub fn send(&self, object: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(object).map_err(io::Error::other)?;
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let slices = [IoSlice::new(&bytes)];
        loop {
            match sendmsg::<()>(self.fd.as_raw_fd(), &slices, control, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes one packet that is there. None: the other side has gone.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut control = nix::cmsg_space!([RawFd; KERNEL_MAX_FILES]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let (length, numbers, cut) = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let got = recvmsg::<()>(self.fd.as_raw_fd(), &mut slices, Some(&mut control), flags);
            match got {
                Ok(got) => {
                    let mut numbers = Vec::new();
                    for message in got.cmsgs().into_iter().flatten() {
                        if let ControlMessageOwned::ScmRights(more) = message {
                            numbers.extend(more);
                        }
                    }
                    let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
                    break (got.bytes, numbers, got.flags.intersects(cut));
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let files = sys::received(&numbers);
        if cut || files.len() > MAX_FILES {
            return Err(io::Error::other("packet is too long"));
        }
        if length == 0 {
            // An empty packet and the end look the same, and nobody sends empty packets.
            return Ok(None);
        }
        bytes.truncate(length);
        Ok(Some(Packet { bytes, files }))
    }

    /// Waits for one answer until `deadline`.
    pub fn answer(&self, deadline: Instant) -> io::Result<(Answer, Vec<OwnedFd>)> {
        loop {
            match self.receive() {
                Ok(Some(packet)) => {
                    let answer = serde_json::from_slice(&packet.bytes).map_err(io::Error::other)?;
                    return Ok((answer, packet.files));
                }
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut wait = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wait, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What the supervisor below `run_dir` keeps of the shim at `socket`; none without a supervisor, or
/// when it does not answer within `patience`.
pub fn fetch(run_dir: &Path, socket: &Path, patience: Duration) -> Vec<(String, OwnedFd)> {
    let until = Instant::now() + patience;
    let ask = || -> io::Result<Vec<(String, OwnedFd)>> {
        let link = Link::connect(&path(run_dir))?;
        let socket = socket.to_owned();
        link.send(&Word::Fetch { socket }, &[])?;
        let mut kept = Vec::new();
        loop {
            let (answer, files) = link.answer(until)?;
            let Answer::Kept { names, more } = answer else {
                return Err(io::Error::other("not what was asked for"));
            };
            if names.len() != files.len() {
                return Err(io::Error::other("names and descriptors do not go together"));
            }
            kept.extend(names.into_iter().zip(files));
            if !more {
                return Ok(kept);
            }
        }
    };
    ask().unwrap_or_default()
}

/// Says that a shim's coming end is meant. Whether anybody hears it or not.
pub fn announce_end(run_dir: &Path, socket: &Path, process: Process) {
    let say = || -> io::Result<()> {
        let link = Link::connect(&path(run_dir))?;
        let word = Word::Leave {
            socket: socket.to_owned(),
            process: Named(process),
        };
        link.send(&word, &[])?;
        link.answer(Instant::now() + PATIENCE).map(drop)
    };
    // No supervisor, no successor.
    let _ = say();
}

/// How `process`, which has ended, did it, as the supervisor below `run_dir` has witnessed; it is
/// asked until `until`, as the kernel tells of an end some moments later.
pub fn how_ended(run_dir: &Path, process: Process, until: Instant) -> Option<u32> {
    let link = Link::connect(&path(run_dir)).ok()?;
    let process = Named(process);
    loop {
        link.send(&Word::How { process }, &[]).ok()?;
        match link.answer(until).ok()?.0 {
            Answer::Ended { soon: true, .. } if Instant::now() < until => {
                std::thread::sleep(ASKED_AGAIN);
            }
            Answer::Ended { status, .. } => return status,
            Answer::Dropped { .. } | Answer::Kept { .. } | Answer::Noted => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, accept4, bind, listen, socketpair};
    use std::{
        fs::File,
        io::{Read, Write},
    };

    fn pair() -> (Link, Link) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Link::of(a).unwrap(), Link::of(b).unwrap())
    }

    const SHIM: Process = Process {
        pid: 7,
        start_time: 1 << 40,
    };

    #[test]
    fn words_and_descriptors_arrive_as_they_were_sent() {
        let (shim, supervisor) = pair();
        let words = [
            Word::Shim {
                socket: "/s/0".into(),
                process: Named(SHIM),
            },
            Word::Keep {
                name: "stdin:a/".into(),
            },
            Word::Drop {
                names: vec!["stdin:a/".into()],
                number: 3,
            },
            Word::Fetch {
                socket: "/s/0".into(),
            },
            Word::Leave {
                socket: "/s/0".into(),
                process: Named(SHIM),
            },
            Word::How {
                process: Named(SHIM),
            },
        ];
        let (mut reader, writer) = io::pipe().unwrap();
        for word in &words {
            let files = match word {
                Word::Keep { .. } => vec![writer.as_fd()],
                _ => Vec::new(),
            };
            shim.send(word, &files).unwrap();
        }
        drop(writer);
        for word in &words {
            let packet = supervisor.receive().unwrap().unwrap();
            assert_eq!(
                &serde_json::from_slice::<Word>(&packet.bytes).unwrap(),
                word
            );
            for file in packet.files {
                File::from(file).write_all(b"kept").unwrap();
            }
        }
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
        let nothing = supervisor.receive().unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        drop(shim);
        assert!(supervisor.receive().unwrap().is_none());
    }

    #[test]
    fn nobody_is_waited_for_longer_than_was_said() {
        let (shim, _silent) = pair();
        let begun = Instant::now();
        let answer = shim.answer(begun + Duration::from_millis(30));
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // Its queue is full: the sender goes on without.
        let word = Word::Keep { name: "x".into() };
        let full = std::iter::repeat_with(|| shim.send(&word, &[])).find_map(Result::err);
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
        let folder = tempfile::tempdir().unwrap();
        assert!(fetch(folder.path(), Path::new("/s/0"), PATIENCE).is_empty());
        announce_end(folder.path(), Path::new("/s/0"), SHIM);
    }

    /// A supervisor below `folder` that answers each word of one connection with the next of these.
    fn answers(folder: &Path, answers: Vec<Answer>) -> std::thread::JoinHandle<()> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path(folder)).unwrap()).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        std::thread::spawn(move || {
            let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
            let link = Link::of(sys::received(&[number]).pop().unwrap()).unwrap();
            for answer in answers {
                let mut wait = [PollFd::new(link.as_fd(), PollFlags::POLLIN)];
                poll(&mut wait, PollTimeout::NONE).unwrap();
                link.receive().unwrap().unwrap();
                link.send(&answer, &[]).unwrap();
            }
        })
    }

    #[test]
    fn an_end_that_is_not_told_yet_is_asked_for_again() {
        let ended = |status, soon| Answer::Ended { status, soon };
        let rows = [
            (vec![ended(None, true), ended(Some(7), false)], Some(7)),
            (vec![ended(None, false)], None),
            (vec![Answer::Noted], None),
        ];
        for (said, expected) in rows {
            let folder = tempfile::tempdir().unwrap();
            let until = Instant::now() + Duration::from_secs(30);
            assert_eq!(
                how_ended(folder.path(), SHIM, until),
                None,
                "nobody is there"
            );
            let supervisor = answers(folder.path(), said);
            assert_eq!(how_ended(folder.path(), SHIM, until), expected);
            supervisor.join().unwrap();
        }
    }

    #[test]
    fn what_is_kept_is_fetched_in_as_many_packets_as_it_takes() {
        let folder = tempfile::tempdir().unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        let address = UnixAddr::new(&path(folder.path())).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        let kept = std::thread::scope(|scope| {
            scope.spawn(|| {
                let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
                let link = Link::of(sys::received(&[number]).pop().unwrap()).unwrap();
                let mut wait = [PollFd::new(link.as_fd(), PollFlags::POLLIN)];
                poll(&mut wait, PollTimeout::NONE).unwrap();
                link.receive().unwrap().unwrap();
                let file = File::open("/dev/null").unwrap();
                for more in [true, false] {
                    let names = vec!["connection".to_owned(); 2];
                    let answer = Answer::Kept { names, more };
                    link.send(&answer, &[file.as_fd(), file.as_fd()]).unwrap();
                }
            });
            fetch(folder.path(), Path::new("/s/0"), Duration::from_secs(30))
        });
        assert_eq!(kept.len(), 4);
    }

    #[test]
    fn too_much_is_refused_and_closed() {
        let (shim, supervisor) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        let files = vec![writer.as_fd(); MAX_FILES + 8];
        shim.send(&Word::Keep { name: "x".into() }, &files).unwrap();
        drop(files);
        drop(writer);
        assert!(supervisor.receive().is_err());
        // Whatever was taken in is closed again.
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let long = Word::Keep {
            name: "x".repeat(MAX_PACKET),
        };
        shim.send(&long, &[]).unwrap();
        assert!(supervisor.receive().is_err());
    }
}
